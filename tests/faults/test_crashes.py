"""A process that is killed at any place, and started again, ends with the bits that it would have ended with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_model
from flow.conftest import check, run_command
from flow.workers import commits, make_plan, model_folder, training_log, worker_command, write_plan
from tercet.crash_point import VARIABLE
from tercet.ledger import read as read_ledger
from tercet.storage import open_storage
from tercet.verify import verify_rows

NUM_STEPS = 22
# What a start makes anew: times, and the loss since the last line of the log. And transformers, when it loads a
# tokenizer that was in use, writes into tokenizer_config.json the truncation that tokenizer.json has in any case.
NOT_COMPARED = {"trainer_state.json", "training_args.bin", "tokenizer_config.json"}


@dataclass(frozen=True)
class Kill:
    """SIGKILL to one rank at a named place (see crash_point.py)."""

    at: str
    step: int
    rank: int = 0
    num_workers: int = 1
    goes_on_from: int = 0

    def __str__(self) -> str:
        return f"{self.at}-{self.step}-rank{self.rank}of{self.num_workers}"


def kill(at: str, step: int, goes_on_from: int, rank: int = 0, num_workers: int = 1) -> Kill:
    """Reads as a sentence."""
    return Kill(at, step, rank, num_workers, goes_on_from)


CHECKPOINTS = (4, 8, 11, 12, 16, 20, 22)  # epochs end after 11 and 22
IN_UPLOADER = {"before_upload", "mid_upload", "before_commit", "after_commit", "mid_retention"}
KILLS = [
    kill("before_step", step=1, goes_on_from=0),  # there is no checkpoint yet
    kill("after_backward", step=7, goes_on_from=4, rank=1, num_workers=2),
    kill("after_step", step=8, goes_on_from=4),
    kill("before_upload", step=8, goes_on_from=4, rank=1, num_workers=2),
    kill("mid_upload", step=12, goes_on_from=11),
    kill("before_commit", step=12, goes_on_from=11),
    kill("after_commit", step=16, goes_on_from=16, num_workers=2),
    kill("in_evaluation", step=11, goes_on_from=8),
    kill("mid_retention", step=4, goes_on_from=11),
    kill("before_commit", step=22, goes_on_from=20),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout: random numbers must come back too."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    return tiny_model.tiny_bert(folder, tiny_model.all_texts(), dropout=0.1, pooler=False)


def settings(num_workers: int) -> dict[str, Any]:
    return {
        "training": {"num_epochs": 2, "warmup_ratio": 0.3, "gradient_accumulation_steps": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
        "workers": {"num_workers": num_workers},
    }


@pytest.fixture(scope="module")
def whole(
    model: Path, store: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """Runs that nothing happened to, by number of workers."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for num_workers in (1, 2):
        runs[num_workers] = f"whole-{num_workers}"
        plan = write_plan(folder, runs[num_workers], model, store, **settings(num_workers))
        check(run_command(worker_command(plan), environment, folder))
    return runs


def what_counts(store: Path, run_id: str) -> dict[str, Any]:
    """Of the last checkpoint: the hash of every file, the ledger of all ranks together, and the metrics; and of every
    evaluation, the document."""
    last = commits(store, run_id)[0]
    ledger = [name for name in last.files if name.startswith("ledger-")]
    files = {name: last.files[name].sha256 for name in last.files.keys() - NOT_COMPARED - set(ledger)}
    assert {name.split("-")[0] for name in files} >= {
        "model.safetensors",
        "optimizer",
        "scheduler.pt",
        "tokenizer.json",
    }
    evaluations = {path.name: path.read_text() for path in (store / "runs" / run_id / "evaluations").iterdir()}
    rows = read_ledger(model_folder(store, last)).tolist()
    return {"step": last.step, "metrics": last.metrics, "files": files, "rows": rows, "evaluations": evaluations}


@pytest.mark.parametrize("crash", KILLS, ids=str)
def test_a_kill_changes_nothing(
    crash: Kill, whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run_id = f"killed-{crash}"
    plan = write_plan(tmp_path, run_id, model, store, **settings(crash.num_workers))
    fired = tmp_path / "fired"
    armed = f"at={crash.at} rank={crash.rank} step={crash.step} once={fired}"
    died = run_command(worker_command(plan), {**environment, VARIABLE: armed}, tmp_path)
    assert fired.exists(), died.stdout[-3000:]
    assert died.returncode != 0
    assert not (store / "runs" / run_id / "training.json").exists()

    check(run_command(worker_command(plan), environment, tmp_path))
    resumed_from_step = training_log(store, run_id)["resumed_from_step"]
    # Uploads run beside the training: how far they were when it was killed is chance, but not within their own thread.
    if crash.at in IN_UPLOADER and crash.rank == 0:
        assert resumed_from_step == crash.goes_on_from
    assert resumed_from_step in [step for step in (0, *CHECKPOINTS) if step <= crash.goes_on_from]
    assert what_counts(store, run_id) == what_counts(store, whole[crash.num_workers])
    # Nothing that the dead left is in the way, or in storage.
    kept = [commit.step for commit in commits(store, run_id)]
    assert kept == [commit.step for commit in commits(store, whole[crash.num_workers])]
    assert {int(path.name) for path in (store / "runs" / run_id / "checkpoints").iterdir()} == set(kept)

    proof = verify_rows(open_storage(str(store)), make_plan(tmp_path / f"{run_id}.yaml", run_id))
    assert proof.holds, proof.text()
    assert proof.num_steps == NUM_STEPS
    assert len(proof.attempts) == (2 if resumed_from_step else 1)


def test_a_checkpoint_between_evaluations_is_of_no_metrics(whole: dict[int, str], store: Path) -> None:
    """With those of the evaluation before, it could be taken for the best."""
    last, between = commits(store, whole[1])
    assert (between.step, between.metrics) == (20, {})
    assert last.metrics.keys() >= {"loss", "ndcg@10"}


def test_a_run_that_was_killed_twice_and_moved_to_more_workers(
    model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The ledger goes through three attempts, of one, two and one worker."""
    for attempt, (num_workers, step) in enumerate([(1, 8), (2, 16), (1, None)]):
        plan = write_plan(tmp_path, "moved", model, store, **settings(num_workers))
        armed = {} if step is None else {VARIABLE: f"at=before_commit step={step} once={tmp_path / str(attempt)}"}
        done = run_command(worker_command(plan), {**environment, **armed}, tmp_path)
        assert (done.returncode == 0) == (step is None), done.stdout[-3000:]
    proof = verify_rows(open_storage(str(store)), make_plan(tmp_path / "moved.yaml", "moved"))
    assert proof.holds, proof.text()
    assert [text.split(": ")[1] for text in proof.attempts] == [
        "steps 1 to 4 on 1 workers",
        "steps 5 to 12 on 2 workers",
        "steps 13 to 22 on 1 workers",
    ]
