"""A run that is killed at any place and started again ends with the same bits as an undisturbed run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.commands import check, run_command
from support.interrupted_run import CHECKPOINTS, NUM_STEPS, final_state, proof, settings
from support.tiers import in_soak
from support.workers import commits, training_log, worker_of, write_plan
from tercet.artifacts import journal
from tercet.failpoints import VARIABLE
from tercet.storage import open_storage


@dataclass(frozen=True)
class Kill:
    """A SIGKILL of one rank at a named place (see failpoints.py)."""

    at: str
    step: int
    rank: int = 0
    num_workers: int = 1
    resumes_from: int = 0

    def __str__(self) -> str:
        return f"{self.at}-{self.step}-rank{self.rank}of{self.num_workers}"


def kill(at: str, step: int, resumes_from: int, rank: int = 0, num_workers: int = 1) -> Kill:
    """Return a Kill, in the order in which it reads best."""
    return Kill(at, step, rank, num_workers, resumes_from)


IN_UPLOADER = {"after_write", "before_upload", "mid_upload", "before_commit", "after_commit", "mid_retention"}
KILLS = [
    kill("after_backward", step=7, resumes_from=4, rank=1, num_workers=2),
    kill("before_commit", step=12, resumes_from=11),
    kill("mid_retention", step=4, resumes_from=11),
]
MORE_KILLS = [
    kill("before_step", step=1, resumes_from=0),  # there is no checkpoint yet
    kill("before_upload", step=8, resumes_from=4, rank=1, num_workers=2),
    kill("after_write", step=8, resumes_from=4),
    kill("after_commit", step=16, resumes_from=16, num_workers=2),
    kill("in_evaluation", step=11, resumes_from=8),
    kill("after_commit", step=22, resumes_from=22),  # only cleaning up is left
]


@pytest.mark.parametrize("crash", [*KILLS, *in_soak(MORE_KILLS)], ids=str)
def test_a_kill_does_not_change_the_result(
    crash: Kill, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run_id = f"killed-{crash}"
    plan = write_plan(tmp_path, run_id, model, store, **settings(crash.num_workers))
    fired = tmp_path / "fired"
    armed = f"at={crash.at} rank={crash.rank} step={crash.step} once={fired}"
    died = run_command(worker_of(plan), {**environment, VARIABLE: armed}, tmp_path)
    assert fired.exists(), died.stdout[-3000:]
    assert died.returncode != 0
    assert not (store / "runs" / run_id / "training.json").exists()

    check(run_command(worker_of(plan), environment, tmp_path))
    resumed_from_step = training_log(store, run_id)["resumed_from_step"]
    # Uploads run in a thread of their own. Their progress at the kill is random, unless the kill is in that thread.
    if crash.at in IN_UPLOADER and crash.rank == 0:
        assert resumed_from_step == crash.resumes_from
    assert resumed_from_step in [step for step in (0, *CHECKPOINTS) if step <= crash.resumes_from]
    assert final_state(store, run_id) == final_state(store, whole[crash.num_workers])
    assert journal.counts(open_storage(str(store)), run_id) == {"lost": 1}
    attempts = proof(store, tmp_path / f"{run_id}.yaml", run_id).attempts
    # Only attempts that led to the last checkpoint are counted.
    assert len(attempts) == (1 if resumed_from_step in (0, NUM_STEPS) else 2)


@pytest.mark.parametrize("num_workers", [*in_soak([1]), 2])
def test_a_hang_ends_with_stacks_and_does_not_change_the_result(
    num_workers: int, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """If one rank hangs in the middle of a step, the others hang in a collective."""
    run_id = f"hung-{num_workers}"
    sections = settings(num_workers)
    limited = {**sections, "workers": {**sections["workers"], "step_timeout_seconds": 40}}
    plan = write_plan(tmp_path, run_id, model, store, **limited)
    armed = f"at=before_step rank={num_workers - 1} step=15 do=hang once={tmp_path / 'fired'}"
    hung = run_command(worker_of(plan), {**environment, VARIABLE: armed}, tmp_path)
    assert hung.returncode != 0
    reports = hung.stdout.split("no step within 40 s on rank ")[1:]
    assert any(text.startswith(str(num_workers - 1)) and "in crash_point" in text for text in reports)  # where it hung
    plan = write_plan(tmp_path, run_id, model, store, **sections)
    check(run_command(worker_of(plan), environment, tmp_path))
    assert final_state(store, run_id) == final_state(store, whole[num_workers])
    assert journal.counts(open_storage(str(store)), run_id) == {"hung": 1}


def test_a_checkpoint_between_evaluations_has_no_metrics(whole: dict[int, str], store: Path) -> None:
    """With the metrics of the last evaluation, it could be mistaken for the best checkpoint."""
    last, between = commits(store, whole[1])
    assert (between.step, between.metrics) == (20, {})
    assert last.metrics.keys() >= {"loss", "ndcg@10"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, less than a checkpoint of the tiny model needs."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.soak
def test_a_full_disk_ends_the_run_which_then_resumes(
    small_disk: Path, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "full", model, store, **settings())
    died = run_command(worker_of(plan), {**environment, "TMPDIR": str(small_disk)}, tmp_path)
    assert died.returncode == 5
    assert "tercet: a disk of this machine is full, or fails" in died.stdout
    assert commits(store, "full") == []
    check(run_command(worker_of(plan), environment, tmp_path))
    assert final_state(store, "full") == final_state(store, whole[1])
    assert journal.counts(open_storage(str(store)), "full") == {"disk_full": 1}


def test_a_run_killed_twice_and_resumed_on_other_numbers_of_workers(
    model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The ledger covers three attempts of one elastic run, on one, two and one worker."""
    for attempt, (num_workers, step) in enumerate([(1, 8), (2, 16), (1, None)]):
        sections = settings()
        sections["workers"] = {"num_workers": num_workers, "min": 1, "max": 2}
        plan = write_plan(tmp_path, "moved", model, store, **sections)
        armed = {} if step is None else {VARIABLE: f"at=before_commit step={step} once={tmp_path / str(attempt)}"}
        done = run_command(worker_of(plan), {**environment, **armed}, tmp_path)
        assert (done.returncode == 0) == (step is None), done.stdout[-3000:]
    attempts = proof(store, tmp_path / "moved.yaml", "moved").attempts
    assert [text.split(": ")[1] for text in attempts] == [
        "steps 1 to 4 on 1 workers",
        "steps 5 to 12 on 2 workers",
        "steps 13 to 22 on 1 workers",
    ]
