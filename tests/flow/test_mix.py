"""A mix of triplets and pairs, measured on the triplets alone; every number of workers gives the same model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import tiny_model
from support.commands import check, run_command, tercet
from support.workers import (
    commits,
    final_weights,
    largest_difference,
    make_plan,
    training_log,
    worker_of,
)
from tercet.artifacts.report import RunReport
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage
from tercet.storage.documents import unseal

# `pairs` fills 5 global batches of 16, and contributes 8 to each epoch.
MIX = [{"name": "pairs", "weight": 1.6}]
# Rounding differs between one and two workers, and training amplifies it: after 44 steps at a rate of 0.005 weights are
# 3e-5 apart without a mix, too. At a tenth of the rate 38 steps stay below 1e-6.
TRAINING = {"num_epochs": 2, "learning_rate": 0.0005}
LARGEST_DIFFERENCE = 2e-6
SECTIONS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "accumulated": {"training": {**TRAINING, "gradient_accumulation_steps": 2}},
}


def publish_pairs(folder: Path, store: Path, name: str, rows: Iterable[dict[str, str]]) -> None:
    """Publish a version of pairs, all in the train split."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {column: column for column in ("anchor", "positive")}
    build_version([path], open_storage(str(store)), name, IngestOptions(columns=columns), fractions=(1.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def mixed_store(tmp_path_factory: pytest.TempPathFactory, triplets_file: Path) -> Path:
    """Storage with the triplets `tiny`, 85 new pairs `pairs`, and `leaky`, which repeats the rows of `tiny`."""
    folder, store = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("mixed-store")
    build_version([triplets_file], open_storage(str(store)), "tiny", IngestOptions(group="group"))
    known = {row["anchor"] for row in tiny_model.triplets()}
    new = [row for row in tiny_model.triplets(120, seed=1) if row["anchor"] not in known][:85]
    publish_pairs(folder, store, "pairs", new)
    publish_pairs(folder, store, "leaky", tiny_model.triplets())
    return store


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, mixed_store: Path, tiny_model_dir: Path, environment: dict[str, str]
) -> Path:
    """The storage after each of SECTIONS was trained on one and on two workers."""
    folder = tmp_path_factory.mktemp("plans")
    for num_workers in (1, 2):
        plans = [
            write_mix(folder, f"{num_workers}-{name}", tiny_model_dir, mixed_store, num_workers, **sections)
            for name, sections in SECTIONS.items()
        ]
        check(run_command(worker_of(*plans), environment, folder))
    return mixed_store


def write_mix(folder: Path, run_id: str, model: Path, store: Path, num_workers: int, **sections: Any) -> Path:
    """Write the plan of a run with MIX, unless `sections` name another mix."""
    mix = sections.pop("mix", MIX)
    laid = {"training": TRAINING, "workers": {"num_workers": num_workers}, **sections}
    recipe = write_mixed_recipe(folder / f"{run_id}.yaml", model, store, mix, **laid)
    path = folder / f"{run_id}.json"
    path.write_text(make_plan(recipe, run_id).model_dump_json(), encoding="utf-8")
    return path


def write_mixed_recipe(path: Path, model: Path, store: Path, mix: list[dict[str, Any]], **sections: Any) -> Path:
    """Write a recipe of tiny_model with a mix."""
    document = {**tiny_model.recipe(model, store, **sections), "mix": mix}
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def losses(store: Path, run_id: str) -> list[float]:
    return [entry["loss"] for entry in training_log(store, run_id)["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_number_of_workers_changes_nothing(trained: Path, name: str) -> None:
    assert (
        largest_difference(final_weights(trained, f"1-{name}"), final_weights(trained, f"2-{name}"))
        < LARGEST_DIFFERENCE
    )
    assert losses(trained, f"2-{name}") == pytest.approx(losses(trained, f"1-{name}"), abs=1e-4)


def test_every_planned_step_is_taken(trained: Path) -> None:
    for num_workers in (1, 2):
        log = training_log(trained, f"{num_workers}-mixed")["log_history"]
        assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 2 * (11 + 8) + 1))
        assert [commit.step for commit in commits(trained, f"{num_workers}-mixed")] == [38, 19]


def test_a_leak_is_refused_before_training(
    tmp_path: Path, mixed_store: Path, tiny_model_dir: Path, environment: dict[str, str]
) -> None:
    plan = write_mix(tmp_path, "leaky", tiny_model_dir, mixed_store, 2, mix=[*MIX, {"name": "leaky"}])
    done = run_command(worker_of(plan), environment, tmp_path)
    made = TrainPlan.model_validate_json(plan.read_text())
    num_held_out = made.num_rows["eval"] + made.num_rows["test"]
    assert done.returncode != 0
    refusal = f"{num_held_out} train rows of leaky hold an anchor or a positive of tiny's eval or test split, such as "
    assert done.stdout.count(f"tercet: {refusal}") == 2  # on each rank
    assert "rows of pairs" not in done.stdout
    assert not (mixed_store / "runs/leaky").exists()


@pytest.mark.soak
def test_a_whole_run_of_a_mix_ends_with_a_model_card(
    tmp_path: Path, mixed_store: Path, tiny_model_dir: Path, environment: dict[str, str]
) -> None:
    sections = {"training": {"num_epochs": 1}, "workers": {"num_workers": 2}}
    recipe = write_mixed_recipe(tmp_path / "r.yaml", tiny_model_dir, mixed_store, MIX, **sections)
    done = check(run_command(tercet("train", recipe, "--run-id", "whole"), environment, tmp_path))
    assert "  mix      tiny " in done.stdout
    assert "  mix      pairs " in done.stdout
    report = unseal(RunReport, (mixed_store / "runs/whole/report.json").read_bytes(), "report.json")
    assert report.gain > 0.1
    card = (mixed_store / "runs/whole/best/README.md").read_text()
    assert "85 rows of `pairs` (version `" in card
    assert "`, weight 1.6)" in card
    again = run_command(tercet("train", recipe, "--run-id", "whole", "--set", "mix=[]"), environment, tmp_path)
    assert "exists with another recipe" in check(again, 2).stdout
