"""A machine is taken away with notice. The run saves a checkpoint at once and loses no step."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from support.commands import check, run_command
from support.interrupted_run import final_state, proof, settings
from support.tiers import in_soak
from support.workers import armed_worker, commits, held_worker, training_log, wait_until, worker_of, write_plan
from tercet.artifacts import journal
from tercet.storage import open_storage


def test_a_single_worker_gets_notice(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "notice", model, store, **settings())
    go = tmp_path / "go"
    with held_worker(plan, environment, step=14, until=go) as worker:
        wait_until(plan.with_suffix(".held").exists, worker)
        worker.send_signal(signal.SIGTERM)
        go.touch()
        assert worker.wait(timeout=400) == 6
    log = plan.with_suffix(".log").read_text()
    assert "Traceback" not in log
    assert "tercet: the machine is about to be taken away; step 14 is saved" in log
    assert commits(store, "notice")[0].step == 14
    assert not (store / "runs/notice/evaluations/00000014.json").exists()

    # Started, not forked: a process that hashes strings with a seed of its own ends with the same bits.
    check(run_command(worker_of(plan).command, environment, tmp_path))
    assert training_log(store, "notice")["resumed_from_step"] == 14
    assert final_state(store, "notice") == final_state(store, whole[1])
    assert journal.counts(open_storage(str(store)), "notice") == {"preempted": 1}
    attempts = proof(store, tmp_path / "notice.yaml", "notice").attempts
    assert [text.split(": ")[1] for text in attempts] == ["steps 1 to 14 on 1 workers", "steps 15 to 22 on 1 workers"]


@pytest.mark.parametrize(("step", "saved"), [(5, 5), *in_soak([(11, 11)])], ids=["within an epoch", "at its end"])
def test_one_of_two_ranks_gets_notice(
    step: int, saved: int, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Rank 0 uploads slowly. Until it is done, no rank may end: torchrun would then kill the others."""
    run_id, held, go = f"notice-{step}", tmp_path / "held", tmp_path / "go"
    plan = write_plan(tmp_path, run_id, model, store, **settings(2))
    armed = (
        f"at=after_step rank=1 step={step} do=notice once={tmp_path / 'fired'};"
        f"at=before_upload rank=0 step={saved} do=hang once={held} until={go}"
    )
    part, log = f"checkpoints/{saved:08d}/*/rank-1.json", plan.with_suffix(".log")
    with armed_worker(plan, environment, armed) as ranks:
        try:
            wait_until(lambda: held.exists() and any((store / "runs" / run_id).glob(part)), ranks)
            time.sleep(2)
            assert "is saved" not in log.read_text()
        finally:
            go.touch()  # even if an assertion fails: the ranks outlive torchrun
        assert ranks.wait(timeout=400) != 0
    assert f"step {saved} is saved" in log.read_text()
    assert commits(store, run_id)[0].step == saved

    check(run_command(worker_of(plan), environment, tmp_path))
    assert training_log(store, run_id)["resumed_from_step"] == saved
    assert final_state(store, run_id) == final_state(store, whole[2])
