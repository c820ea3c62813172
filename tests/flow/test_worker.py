"""The worker without Ray: the same seed gives the same bits, the number of workers changes nothing, a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flow.conftest import check, run_command
from flow.workers import (
    commits,
    final_weights,
    largest_difference,
    model_folder,
    training_log,
    weights,
    worker_command,
    write_plan,
)

Train = Callable[..., str]

LOSSES: dict[str, dict[str, Any]] = {
    "MultipleNegativesRankingLoss": {"name": "MultipleNegativesRankingLoss"},
    "TripletLoss": {"name": "TripletLoss", "distance_metric": "cosine", "triplet_margin": 0.5},
}


@pytest.fixture(scope="module")
def train(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> Train:
    """Trains a run to its end, once for each id; the id."""
    folder = tmp_path_factory.mktemp("plans")
    done: set[str] = set()

    def run(run_id: str, *, num_workers: int = 1, loss: str = "MultipleNegativesRankingLoss", **training: Any) -> str:
        if run_id not in done:
            workers = {"num_workers": num_workers}
            training = {"num_epochs": 2, **training}
            plan = write_plan(
                folder, run_id, tiny_model_dir, store, loss=LOSSES[loss], training=training, workers=workers
            )
            check(run_command(worker_command(plan), environment, folder))
            done.add(run_id)
        return run_id

    return run


def test_one_seed_gives_equal_bits(train: Train, store: Path) -> None:
    first, again = train("two", num_workers=2), train("two-again", num_workers=2)
    assert largest_difference(final_weights(store, first), final_weights(store, again)) == 0.0


def test_another_seed_gives_other_weights(train: Train, store: Path) -> None:
    assert largest_difference(final_weights(store, train("one")), final_weights(store, train("seed", seed=7))) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
def test_the_number_of_workers_changes_nothing(train: Train, store: Path, loss: str) -> None:
    """In-batch negatives cross ranks, gradients are averaged, and the global batches are the same."""
    short = "" if loss == "MultipleNegativesRankingLoss" else "-triplet"
    one, two = train(f"one{short}", loss=loss), train(f"two{short}", num_workers=2, loss=loss)
    assert largest_difference(final_weights(store, one), final_weights(store, two)) < 2e-5
    steps = [[entry["loss"] for entry in training_log(store, run)["log_history"] if "loss" in entry] for run in (one, two)]
    assert len(steps[0]) == 22
    assert steps[1] == pytest.approx(steps[0], abs=1e-4)


def test_nor_with_accumulated_gradients(train: Train, store: Path) -> None:
    one = train("one-accumulated", gradient_accumulation_steps=2)
    two = train("two-accumulated", num_workers=2, gradient_accumulation_steps=2)
    assert largest_difference(final_weights(store, one), final_weights(store, two)) < 2e-5


def test_metrics_do_not_depend_on_the_number_of_workers(train: Train, store: Path) -> None:
    one, two = (commits(store, run) for run in (train("one-triplet", loss="TripletLoss"), train("two-triplet")))
    for left, right in zip(one, two, strict=True):
        assert left.step == right.step
        assert right.metrics == pytest.approx(left.metrics, abs=0.02), "the eval loss may weigh the last batch otherwise"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_plain_trainer_ends_with_the_same_weights(
    train: Train, store: Path, tmp_path: Path, tiny_model_dir: Path, environment: dict[str, str], loss: str
) -> None:
    """SentenceTransformerTrainer by itself, told the same settings in its own words."""
    one = train("one" if loss == "MultipleNegativesRankingLoss" else "one-triplet", loss=loss)
    script = [sys.executable, Path(__file__).with_name("plain_trainer.py"), tiny_model_dir, store, tmp_path, loss]
    check(run_command([str(part) for part in script], environment, tmp_path))
    assert largest_difference(weights(tmp_path / "final"), final_weights(store, one)) < 1e-6


def test_a_killed_worker_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    """With dropout and a warm-up that is not over: the state of optimizer, schedule and random numbers comes back too."""
    import tiny_model

    model = tiny_model.tiny_bert(tmp_path / "dropout", tiny_model.all_texts(), dropout=0.1)
    settings: dict[str, Any] = {"training": {"num_epochs": 3, "warmup_ratio": 0.5, "log_every_steps": 1}}
    whole = write_plan(tmp_path, "whole", model, store, **settings)
    check(run_command(worker_command(whole), environment, tmp_path))

    killed = write_plan(tmp_path, "killed", model, store, **settings)
    with (tmp_path / "killed.log").open("w") as log:
        # A storage that takes its time for the second checkpoint would be nicer; the pause between steps does as well.
        slow = [sys.executable, str(Path(__file__).with_name("slow_worker.py")), str(killed)]
        process = subprocess.Popen(slow, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            _wait_until(lambda: bool(commits(store, "killed")), process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=20)
    assert [commit.step for commit in commits(store, "killed")] == [11]
    assert not (store / "runs/killed/training.json").exists()

    check(run_command(worker_command(killed), environment, tmp_path))
    assert training_log(store, "killed")["resumed_from_step"] == 11
    assert training_log(store, "whole")["resumed_from_step"] == 0
    assert [commit.step for commit in commits(store, "killed")] == [33, 22, 11]
    assert largest_difference(final_weights(store, "whole"), final_weights(store, "killed")) == 0.0
    assert commits(store, "killed")[0].metrics == commits(store, "whole")[0].metrics


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    train: Train, tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    plan = write_plan(tmp_path, "damaged", tiny_model_dir, store, training={"num_epochs": 2})
    check(run_command(worker_command(plan), environment, tmp_path))
    newest = commits(store, "damaged")[0]
    path = model_folder(store, newest) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = check(run_command(worker_command(plan), environment, tmp_path))
    assert "step 22 is damaged and skipped" in done.stdout
    assert training_log(store, "damaged")["resumed_from_step"] == 11


def test_a_checkpoint_holds_what_its_commit_lists(train: Train, store: Path) -> None:
    for commit in commits(store, train("two", num_workers=2)):
        folder = model_folder(store, commit)
        on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert on_disk - set(commit.files) == {"rank-0.json", "rank-1.json"}
        assert {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(commit.files)
        assert "model.safetensors" in commit.model_files()
        assert not any(name.startswith(("optimizer", "rng_state", "trainer_state")) for name in commit.model_files())


def test_a_plan_for_more_workers_than_started_is_refused(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    plan = write_plan(tmp_path, "refused", tiny_model_dir, store, workers={"num_workers": 2})
    done = run_command([sys.executable, "-m", "tercet.worker", str(plan)], environment, tmp_path)
    assert done.returncode != 0
    assert "the plan is for 2 workers, but 1 were started" in done.stdout
    with contextlib.suppress(FileNotFoundError):
        assert not os.listdir(store / "runs/refused")
    assert json.loads(plan.read_text())["config"]["workers"]["num_workers"] == 2
