"""`verify_rows` proves a run whose ledger fits the order of rows, and names wrong steps and repeated rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import builders
from tercet.artifacts.checkpoint import commit_step, upload_part
from tercet.artifacts.lease import Attempt
from tercet.cli.main import main
from tercet.data import order
from tercet.data.build import build_version
from tercet.data.order import DatasetRows, mixed_batches
from tercet.data.versions import read_manifest
from tercet.errors import CorruptObject, TrainingError
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal
from tercet.storage.layout import attempt_folder
from tercet.training import ledger
from tercet.training.ledger import Ledger, file_name, verify_rows


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


@pytest.fixture
def plan(tmp_path: Path, storage: Storage) -> Callable[..., TrainPlan]:
    """Makes a plan of 63 train rows of `poems`, and 25 of `docs` on request; batches of 10, two epochs."""

    def publish(name: str, num_rows: int, fractions: tuple[float, float, float]) -> None:
        path = tmp_path / f"{name}.jsonl"
        rows = [{c: f"{name} {c} {n}" for c in ("anchor", "positive", "negative")} for n in range(num_rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        build_version([path], storage, name, fractions=fractions)

    publish("poems", 100, (0.6, 0.2, 0.2))
    publish("docs", 25, (1.0, 0.0, 0.0))

    def plan(*mix: str, **training: Any) -> TrainPlan:
        sections: dict[str, Any] = {"workers": {"cache_dir": str(tmp_path / "cache")}, "training": training}
        config = builders.config(mix=[{"name": name} for name in mix], **sections)
        manifests = [read_manifest(storage, name) for name in ("poems", *mix)]
        return builders.plan_of(config, *manifests, run_id="r", model=None)

    return plan


def consumed(plan: TrainPlan) -> list[list[int]]:
    """Return the rows of each step, in the order of rows; no text occurs twice in this data."""
    training = plan.config.training
    datasets = [DatasetRows(dataset.num_train_rows, dataset.steps_per_epoch) for dataset in plan.datasets]
    batches = [
        batch
        for epoch in range(training.num_epochs)
        for batch in mixed_batches(datasets, training.global_batch_size, training.seed, epoch)
    ]
    return [batch.tolist() for batch in batches]


def commit(
    storage: Storage, tmp_path: Path, steps: list[list[int]], step: int, lineage: tuple[Attempt, ...] = ()
) -> None:
    """Commit a checkpoint of a run that consumed these rows in its first `step` steps."""
    lineage = lineage or (Attempt(name="a", generation=1, first_step=0, world_size=2),)
    for rank in range(lineage[-1].world_size):
        ledger = Ledger()
        for rows in steps[:step]:
            ledger.consume(rows[rank :: lineage[-1].world_size])
            ledger.close_step()
        folder = tmp_path / f"out-{step}-{rank}"
        folder.mkdir()
        ledger.save(folder, rank, lineage[-1].world_size, step)
        upload_part(storage, folder, attempt_folder("r", step, lineage[-1].name), rank)
    commit_step(storage, "r", step, 0.0, {}, lineage, wait_seconds=1)


def test_a_whole_run(storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan]) -> None:
    made_plan = plan()
    num_rows = made_plan.datasets[0].num_train_rows
    assert num_rows % 10, "this proves nothing unless some rows are left over"
    commit(storage, tmp_path, consumed(made_plan), made_plan.num_steps)
    proof = verify_rows(storage, made_plan)
    assert proof.holds
    assert [(part.number, part.num_rows_consumed, part.num_rows_left_out) for part in proof.passes] == [
        (number, num_rows // 10 * 10, num_rows % 10) for number in (0, 1)
    ]
    text = proof.text()
    assert f"attempt a: steps 1 to {made_plan.num_steps} on 2 workers" in text
    assert f"poems, pass 1: {num_rows // 10 * 10} of {num_rows} rows once each, {num_rows % 10} left over" in text
    assert text.endswith("every step consumed the rows that the order says")


def test_a_mix_and_a_run_that_has_not_ended(storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan]) -> None:
    made_plan = plan("docs", no_duplicates=False)
    lineage = (
        Attempt(name="a", generation=1, first_step=0, world_size=1),
        Attempt(name="b", generation=2, first_step=5, world_size=2),
    )
    commit(storage, tmp_path, consumed(made_plan), made_plan.num_steps - 3, lineage)
    proof = verify_rows(storage, made_plan)
    assert proof.holds
    assert proof.num_steps == made_plan.num_steps - 3 < proof.num_planned_steps
    ended = [(part.dataset, part.number) for part in proof.passes if part.ended]
    assert set(ended) >= {("poems", 0), ("docs", 0)}
    assert not all(part.ended for part in proof.passes)
    assert "attempt a: steps 1 to 5 on 1 workers" in proof.text()
    assert f"attempt b: steps 6 to {made_plan.num_steps - 3} on 2 workers" in proof.text()


@pytest.mark.parametrize(
    "fault", ["a row instead of another", "a step again", "two steps exchanged", "a row twice", "a row less"]
)
def test_a_step_that_consumed_other_rows_is_named(
    storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan], fault: str
) -> None:
    made_plan = plan()
    steps = consumed(made_plan)
    wrong = {4}
    match fault:
        case "a row instead of another":
            steps[3] = [*steps[3][:-1], steps[4][0]]
        case "a step again":  # like a resume that forgets its step
            steps[3] = steps[2]
        case "two steps exchanged":
            steps[3], steps[5] = steps[5], steps[3]
            wrong = {4, 6}
        case "a row twice":
            steps[3] = [*steps[3], steps[3][0]]
        case "a row less":
            steps[3] = steps[3][1:]
    commit(storage, tmp_path, steps, made_plan.num_steps)
    proof = verify_rows(storage, made_plan)
    assert set(proof.wrong_steps) == wrong
    assert not proof.holds
    assert "WRONG: step 4" in proof.text()


def test_an_order_that_repeats_rows_is_detected_although_the_ledger_fits_it(
    storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof counts rows; it does not trust the order."""

    def faulty(*args: Any, **kwargs: Any) -> Any:
        batches = list(order.mixed_batches(*args, **kwargs))
        batches[1] = np.concatenate([batches[1][:-1], batches[0][:1]])
        return iter(batches)

    made_plan = plan()
    steps = consumed(made_plan)
    per_epoch = made_plan.steps_per_epoch
    for first in (0, per_epoch):
        steps[first + 1] = [*steps[first + 1][:-1], steps[first][0]]
    commit(storage, tmp_path, steps, made_plan.num_steps)
    monkeypatch.setattr(ledger, "mixed_batches", faulty)
    proof = verify_rows(storage, made_plan)
    assert proof.wrong_steps == ()
    assert [part.num_rows_repeated for part in proof.passes] == [1, 1]
    assert not proof.holds


def test_a_damaged_ledger_is_skipped_for_an_older_one(
    storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan]
) -> None:
    made_plan = plan()
    with pytest.raises(TrainingError, match="run r has no checkpoint yet"):
        verify_rows(storage, made_plan)
    commit(storage, tmp_path, consumed(made_plan), 4)
    commit(storage, tmp_path, consumed(made_plan), 8)
    storage.put(f"{attempt_folder('r', 8, 'a')}/{file_name(1, 2)}", b"not what it was")
    assert verify_rows(storage, made_plan).num_steps == 4
    storage.delete(f"{attempt_folder('r', 4, 'a')}/{file_name(1, 2)}")
    with pytest.raises(CorruptObject, match="no checkpoint of run r has a ledger that can be read"):
        verify_rows(storage, made_plan)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command(
    storage: Storage, tmp_path: Path, plan: Callable[..., TrainPlan], wrong: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made_plan = plan()
    storage.put("runs/r/plan.json", seal(made_plan))
    steps = consumed(made_plan)
    if wrong:
        steps[0] = steps[1]
    commit(storage, tmp_path, steps, made_plan.num_steps)
    assert main(["runs", "verify", "r", "--storage", str(tmp_path / "store")]) == (6 if wrong else 0)
    assert ("WRONG" in capsys.readouterr().out) == wrong
    assert main(["runs", "verify", "other", "--storage", str(tmp_path / "store")]) == 2
    assert "run other does not exist" in capsys.readouterr().err
