"""Consecutive nights on this machine, as cron would start them: new rows, a promotion, and a candidate that fails."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from support import tiny_model
from support.commands import check, run_command, tercet
from support.workers import largest_difference, weights
from tercet.artifacts.champion import history, read_champion
from tercet.artifacts.registry import list_versions, resolve
from tercet.config.recipe import load_config
from tercet.data.versions import read_manifest
from tercet.failpoints import VARIABLE
from tercet.pipeline.nightly import Night, list_nights, nightly, read_night
from tercet.planning.survey import read_plan
from tercet.storage import open_storage
from tercet.storage.documents import unseal

NUM_ROWS = 640
FIRST, SECOND = 400, 640
SECTIONS: dict[str, dict[str, Any]] = {
    "evaluation": {"metric": "ndcg@10"},
    "gate": {"min_groups": 10, "alpha": 0.05, "slices": {"short": {"column": "anchor", "max_chars": 13}}},
    "workers": {"num_workers": 1},
    "training": {"num_epochs": 3, "learning_rate": 0.005},
}


@dataclass(frozen=True)
class Nights:
    """A model that is trained night by night."""

    folder: Path
    store: Path
    recipe: Path
    environment: dict[str, str]

    def bring(self, name: str, rows: list[dict[str, str]]) -> None:
        """Put a file of new rows into the incoming folder."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / "incoming" / f"{name}.jsonl").write_text(text)

    def start(self, code: int = 0) -> str:
        """Run `tercet nightly` to its end. Return what it printed."""
        command = tercet("nightly", self.recipe)
        return check(run_command(command, self.environment, self.folder), code).stdout

    def last(self) -> Night:
        """Return the result of the newest night."""
        storage = open_storage(str(self.store))
        found = [read_night(storage, "tiny", run_id) for run_id in list_nights(storage, "tiny")]
        return max((night for night in found if night is not None), key=lambda night: night.unix_seconds)


def poisoned(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows with positive and negative swapped."""
    return [{**row, "positive": row["negative"], "negative": row["positive"]} for row in rows]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, environment: dict[str, str]) -> Nights:
    folder = tmp_path_factory.mktemp("nights")
    (folder / "incoming").mkdir()
    store = folder / "store"
    far = (datetime.datetime.now(datetime.UTC).hour + 12) % 24  # far from the hour at which the next night begins
    nightly = {"sources": [str(folder / "incoming/*.jsonl")], "group": "group", "begins_at_utc_hour": far}
    sections = {**SECTIONS, "nightly": nightly}
    sections["dataset"] = {"name": "tiny", "replay": {"new_share": 0.5}}
    model = {"name_or_path": str(tiny_model_dir), "start_from": "champion"}
    recipe = tiny_model.write_recipe(folder / "recipe.yaml", tiny_model_dir, store, model=model, **sections)
    return Nights(folder, store, recipe, environment)


@pytest.fixture(scope="module")
def first(nights: Nights) -> str:
    """Output of the first night, which dies between the decision and the promotion, and is started again."""
    nights.bring("a", tiny_model.triplets(NUM_ROWS)[:FIRST])
    armed = f"at=before_champion once={nights.folder / 'fired'}"
    command = tercet("nightly", nights.recipe)
    died = run_command(command, {**nights.environment, VARIABLE: armed}, nights.folder)
    assert died.returncode == -9, died.stdout[-3000:]
    assert read_champion(open_storage(str(nights.store)), "tiny") is None
    return nights.start()


@pytest.fixture(scope="module")
def second(nights: Nights, first: str) -> str:  # noqa: ARG001 - runs before
    """Output of the second night, whose new rows are poisoned."""
    nights.bring("b", poisoned(tiny_model.triplets(NUM_ROWS)[FIRST:SECOND]))
    return nights.start()


def test_the_first_night_promotes_a_model_better_than_the_base_model(nights: Nights, first: str) -> None:
    assert "data: nothing new; 1 file was read before" in first  # the first start had added its rows
    assert "Promote: ndcg@10" in first
    storage = open_storage(str(nights.store))
    champion, version = resolve(storage, "tiny")
    assert (champion.generation, champion.kind) == (1, "gated")
    assert list_versions(storage, "tiny") == [1]
    plan = read_plan(storage, version.lineage.run_id)
    assert plan.champion is None  # there was none to start from
    night = read_night(storage, "tiny", plan.run_id)
    assert night is not None
    assert (night.outcome, night.champion_before, night.champion) == ("promoted", None, 1)
    assert night.metrics.keys() == {"base", "candidate"}
    assert night.metrics["candidate"]["ndcg@10"] > night.metrics["base"]["ndcg@10"] + 0.2
    assert night.index_impact is not None
    assert night.index_impact.overlap_at_10 < 0.9


def test_the_comparison_measures_the_same_as_the_run(nights: Nights, first: str) -> None:  # noqa: ARG001
    """Another process measures each row again, with the models from storage."""
    storage = open_storage(str(nights.store))
    run_id = resolve(storage, "tiny")[1].lineage.run_id
    folder = nights.store / "runs" / run_id
    reported = json.loads((folder / "metrics.json").read_text())
    for who, name in (("base", "baseline_test"), ("candidate", "best_test")):
        tables = [pq.read_table(folder / f"comparison/{who}/test-{kind}.parquet") for kind in ("queries", "triplets")]
        for table in tables:
            for metric in {"ndcg@10", "mrr@10", "triplet_accuracy"} & set(table.column_names):
                assert np.mean(table[metric].to_numpy()) == pytest.approx(reported[name][metric], abs=1e-6)
        assert tables[0].column_names[:3] == ["anchor", "positive", "group"]


@pytest.mark.soak
def test_a_poisoned_night_changes_nothing(nights: Nights, second: str) -> None:
    night = nights.last()
    assert night.outcome in ("kept", "undecided"), second
    assert (night.champion_before, night.champion) == (1, 1)
    assert "which is not shown to be better than the champion" in second
    storage = open_storage(str(nights.store))
    assert [champion.generation for champion in history(storage, "tiny")] == [1]
    assert night.metrics.keys() == {"base", "champion-1", "candidate"}
    assert night.metrics["candidate"]["ndcg@10"] < night.metrics["champion-1"]["ndcg@10"]
    assert "short" in "".join(path.read_text() for path in (nights.store / "models/tiny/decisions").iterdir())


@pytest.mark.soak
def test_a_night_trains_the_champion_on_new_rows_and_a_draw_of_old_ones(nights: Nights, second: str) -> None:  # noqa: ARG001
    storage, night = open_storage(str(nights.store)), nights.last()
    plan = read_plan(storage, night.run_id)
    champion, version = resolve(storage, "tiny")
    assert plan.champion is not None
    assert (plan.champion.generation, plan.champion.commit) == (1, version.commit)
    old, new = plan.datasets[0].cohorts
    manifest = read_manifest(storage, "tiny")
    assert (old.is_new, new.is_new, new.num_rows) == (False, True, manifest.new_rows["train"])
    assert old.num_kept_rows == new.num_rows == plan.num_train_rows / 2
    assert champion.version == version.number
    # The baseline is the champion, from which training started, not the base model.
    folder = nights.store / "runs"
    began, ended = (
        json.loads((folder / run_id / "metrics.json").read_text()) for run_id in (night.run_id, version.lineage.run_id)
    )
    assert began["baseline_test"]["ndcg@10"] == pytest.approx(night.metrics["champion-1"]["ndcg@10"], abs=1e-6)
    assert ended["best_test"]["ndcg@10"] > ended["baseline_test"]["ndcg@10"]
    assert (
        largest_difference(weights(nights.store / version.commit.folder), weights(folder / night.run_id / "best")) > 0
    )


@pytest.mark.soak
def test_a_finished_night_is_not_repeated(nights: Nights, second: str) -> None:
    again = nights.start()
    assert again.splitlines()[-1:] == second.splitlines()[-1:]
    assert "step " not in again
    assert len(list_nights(open_storage(str(nights.store)), "tiny")) == 2


@pytest.mark.soak
def test_a_night_with_nothing_new_ends_at_once(nights: Nights, second: str) -> None:  # noqa: ARG001
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    night = nightly(load_config(nights.recipe), "a test", lambda _: None, tomorrow)
    assert night.outcome == "nothing_to_do"
    assert "nothing is new since the night of" in night.sentence


@pytest.mark.soak
def test_a_damaged_record_of_a_night_is_refused(nights: Nights, second: str) -> None:  # noqa: ARG001
    night = nights.last()
    path = nights.store / f"models/tiny/nights/{night.run_id}.json"
    assert unseal(Night, path.read_bytes(), "") == night
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"kept"', b'"promoted"').replace(b'"undecided"', b'"promoted"'))
    try:
        message = nights.start(code=5)
        assert "is damaged" in message
        assert "delete it, and start the night again" in message
    finally:
        path.write_bytes(whole)


@pytest.mark.soak
def test_the_command_line_answers_the_questions_of_the_morning(nights: Nights, second: str) -> None:
    assert second.count("test      ") == 3
    listed = check(run_command(tercet("nights", "tiny", "--storage", nights.store), nights.environment, nights.folder))
    assert listed.stdout.count("promoted") == 1
