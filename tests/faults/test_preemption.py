"""A machine that is taken away with notice: the run is saved at once, and loses no step."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from faults.runs import proof, settings, what_counts
from faults.test_two_attempts import slow_worker
from flow.conftest import check, run_command
from flow.workers import commits, training_log, wait_until, worker_command, write_plan
from tercet import incidents
from tercet.crash_point import VARIABLE
from tercet.storage import open_storage


def test_a_lone_worker(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "notice", model, store, **settings())
    log = tmp_path / "notice.log"
    with slow_worker(plan, environment, log) as worker:
        wait_until(lambda: any(commit.step == 12 for commit in commits(store, "notice")), worker)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=60) == 6
    said = log.read_text()
    assert "Traceback" not in said
    saved = re.search(r"Preempted: the machine is about to be taken away; step (\d+) is saved", said)
    assert saved is not None
    step = int(saved[1])
    assert commits(store, "notice")[0].step == step
    assert not (store / "runs/notice/evaluations" / f"{step:08d}.json").exists()

    check(run_command(worker_command(plan), environment, tmp_path))
    assert training_log(store, "notice")["resumed_from_step"] == step
    assert what_counts(store, "notice") == what_counts(store, whole[1])
    assert incidents.counts(open_storage(str(store)), "notice") == {"preempted": 1}
    attempts = proof(store, tmp_path / "notice.yaml", "notice").attempts
    assert [text.split(": ")[1] for text in attempts] == [
        f"steps 1 to {step} on 1 workers",
        f"steps {step + 1} to 22 on 1 workers",
    ]


@pytest.mark.parametrize(("step", "saved"), [(5, 5), (11, 11)], ids=["amid an epoch", "at its end"])
def test_of_two_ranks_one_gets_it(
    step: int, saved: int, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run_id = f"notice-{step}"
    plan = write_plan(tmp_path, run_id, model, store, **settings(2))
    armed = f"at=after_step rank=1 step={step} do=notice once={tmp_path / 'fired'}"
    ended = run_command(worker_command(plan), {**environment, VARIABLE: armed}, tmp_path)
    assert ended.returncode != 0
    assert f"step {saved} is saved" in ended.stdout
    assert commits(store, run_id)[0].step == saved

    check(run_command(worker_command(plan), environment, tmp_path))
    assert training_log(store, run_id)["resumed_from_step"] == saved
    assert what_counts(store, run_id) == what_counts(store, whole[2])
