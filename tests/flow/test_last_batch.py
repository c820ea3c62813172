"""training.last_batch: keep trains what the plain trainer does, whatever the number of workers and the parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.commands import PROGRAMS, check, run_command
from support.forks import Forked
from support.tiers import in_soak
from support.workers import final_weights, largest_difference, training_log, weights, worker_of, write_plan
from tercet.errors import Preempted
from tercet.failpoints import VARIABLE
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage
from tercet.training.ledger import verify_rows

RANKING: dict[str, Any] = {"name": "MultipleNegativesRankingLoss"}
TRIPLET: dict[str, Any] = {"name": "TripletLoss", "distance_metric": "cosine", "triplet_margin": 0.5}
CACHED: dict[str, Any] = {"name": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 3}
# Loss, rows, training, workers. 35 rows: the last of the batches of 16 has 3, fewer than 4 workers. 41 rows: it has 9.
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any]]] = {
    "ranking": (RANKING, 35, {}, {}),
    # Clipped gradients do not show whether they have the right size.
    "unclipped": (RANKING, 35, {"max_grad_norm": 0.0}, {}),
    "triplet": (TRIPLET, 41, {}, {}),
    "cached": (CACHED, 41, {}, {}),
    # Two micro-batches of 8 and 1 rows, and a single one of 3: the other one is missing.
    "accumulated": (RANKING, 41, {"gradient_accumulation_steps": 2}, {}),
    "missing": (TRIPLET, 35, {"gradient_accumulation_steps": 2}, {}),
    "missing-cached": (CACHED, 35, {"gradient_accumulation_steps": 2}, {}),
    "plain": (RANKING, 35, {}, {"packing": "plain"}),
    "chunked": (RANKING, 35, {}, {"packing": "chunked"}),
}
WHOLE = "last-accumulated-1-ddp"


def plan_of(folder: Path, model: Path, store: Path, name: str, num_workers: int, mode: str = "ddp") -> Path:
    loss, num_rows, training, workers = CASES[name]
    run_id = f"last-{name}-{num_workers}-{mode}"
    training = {"num_epochs": 2, "last_batch": "keep", "max_train_rows": num_rows, **training}
    workers = {"num_workers": num_workers, "parallelism": mode, **workers}
    return write_plan(folder, run_id, model, store, loss=loss, training=training, workers=workers)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> Path:
    """The storage after all CASES on 1 and 2 workers."""
    for num_workers in (1, 2):
        train_all(tmp_path_factory.mktemp("last-batch"), tiny_model_dir, store, environment, num_workers)
    return store


@pytest.fixture(scope="module")
def trained_on_four(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, trained: Path, environment: dict[str, str]
) -> Path:
    """The storage after all CASES on 4 workers too."""
    train_all(tmp_path_factory.mktemp("last-batch"), tiny_model_dir, trained, environment, 4)
    return trained


def train_all(folder: Path, model: Path, store: Path, environment: dict[str, str], num_workers: int) -> None:
    plans = [plan_of(folder, model, store, name, num_workers) for name in CASES]
    check(run_command(worker_of(*plans), environment, store))


def losses_of(store: Path, run_id: str) -> list[float]:
    return [entry["loss"] for entry in training_log(store, run_id)["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_end_with_the_weights_of_one(trained: Path, name: str) -> None:
    check_equal(trained, name, 2)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_four_workers_end_with_the_weights_of_one(trained_on_four: Path, name: str) -> None:
    check_equal(trained_on_four, name, 4)


def check_equal(store: Path, name: str, num_workers: int) -> None:
    one, several = f"last-{name}-1-ddp", f"last-{name}-{num_workers}-ddp"
    assert largest_difference(final_weights(store, one), final_weights(store, several)) < 2e-5
    assert len(losses_of(store, one)) == 6  # two epochs of three steps
    assert losses_of(store, several) == pytest.approx(losses_of(store, one), abs=1e-4)


@pytest.mark.parametrize("name", ["ranking", "triplet", "accumulated", "missing"])
def test_the_plain_trainer_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, tiny_model_dir: Path, environment: dict[str, str], name: str
) -> None:
    loss, num_rows, training, _ = CASES[name]
    kind = "triplet" if loss is TRIPLET else "ranking"
    steps = training.get("gradient_accumulation_steps", 1)
    program = (PROGRAMS / "plain_trainer.py", tiny_model_dir, trained, tmp_path, kind, num_rows, steps)
    check(run_command(Forked(tuple(map(str, program))), environment, tmp_path))
    assert largest_difference(weights(tmp_path / kind), final_weights(trained, f"last-{name}-1-ddp")) < 2e-5


@pytest.mark.parametrize("name", ["ranking", "cached", "missing"])
def test_every_row_of_a_pass_is_trained_on_once(trained: Path, tmp_path: Path, tiny_model_dir: Path, name: str) -> None:
    path = plan_of(tmp_path, tiny_model_dir, trained, name, 2)
    proof = verify_rows(open_storage(str(trained)), TrainPlan.model_validate_json(path.read_text()))
    assert proof.holds, proof.text()
    num_rows = CASES[name][1]
    assert [(part.num_rows_consumed, part.num_rows_left_out) for part in proof.passes] == [(num_rows, 0)] * 2


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_resumes_before_and_after_the_last_batch_of_an_epoch(
    trained: Path, tmp_path: Path, tiny_model_dir: Path, environment: dict[str, str], step: int
) -> None:
    loss, num_rows, training, _ = CASES["accumulated"]
    training = {"num_epochs": 2, "last_batch": "keep", "max_train_rows": num_rows, **training}
    sections: dict[str, Any] = {"workers": {"num_workers": 1}, "checkpoint": {"every_steps": 1, "keep_last": 100}}
    run_id = f"last-stopped-{step}"
    path = write_plan(tmp_path, run_id, tiny_model_dir, trained, loss=loss, training=training, **sections)
    notice = f"at=before_step step={step} do=notice once={tmp_path / 'noticed'}"
    check(run_command(worker_of(path), {**environment, VARIABLE: notice}, tmp_path), Preempted.exit_code)
    check(run_command(worker_of(path), environment, tmp_path))
    assert training_log(trained, run_id)["resumed_from_step"] == step
    assert largest_difference(final_weights(trained, run_id), final_weights(trained, WHOLE)) == 0.0


@pytest.mark.parametrize("mode", ["zero3", "fsdp2", *in_soak(["zero2"])])
def test_every_parallelism_ends_with_the_weights_of_ddp(
    trained: Path, tmp_path: Path, tiny_model_dir: Path, environment: dict[str, str], mode: str
) -> None:
    names = ("ranking", "missing", "cached", "chunked")
    plans = [plan_of(tmp_path, tiny_model_dir, trained, name, 2, mode) for name in names]
    check(run_command(worker_of(*plans), environment, tmp_path))
    for name in names:
        sharded, ddp = (final_weights(trained, f"last-{name}-2-{each}") for each in (mode, "ddp"))
        assert largest_difference(sharded, ddp) < 2e-5, name
