"""New test rows whose labels look wrong: a warning if a model does far worse on them only, and none otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import tiny_model
from tercet.artifacts.checkpoint import upload_files
from tercet.artifacts.decision import BASE_MODEL
from tercet.config.recipe import Config
from tercet.data.append import append
from tercet.data.build import build_version
from tercet.data.cache import load_split
from tercet.data.ingest import IngestOptions
from tercet.data.versions import read_manifest
from tercet.evaluation.label_check import MIN_GROUPS, label_warning, warning
from tercet.evaluation.measurement import MeasuredModel, Measurement, Request
from tercet.planning.survey import survey
from tercet.storage import open_storage

ROWS_PER_GROUP = 4


def rows(num_groups: int, mean: float, draw: np.random.Generator) -> np.ndarray:
    """nDCG of rows between 0 and 1: groups differ, and the rows of a group are alike."""
    of_groups = mean + 0.2 * draw.standard_normal(num_groups)
    return np.clip(np.repeat(of_groups, ROWS_PER_GROUP) + 0.1 * draw.standard_normal(4 * num_groups), 0, 1)


def night(num_new: int, new_mean: float, seed: int, num_old: int = 100) -> str | None:
    draw = np.random.default_rng(seed)
    values = np.concatenate([rows(num_old, 0.6, draw), rows(num_new, new_mean, draw)])
    groups = [str(row // ROWS_PER_GROUP) for row in range(len(values))]
    is_new = np.arange(len(values)) >= ROWS_PER_GROUP * num_old
    return warning("ndcg@10", values, groups, is_new)


@pytest.mark.parametrize("num_new", [8, 30])
def test_shuffled_labels_are_noticed(num_new: int) -> None:
    warnings = [night(num_new, 0.02, seed) for seed in range(20)]
    assert all(warnings)
    assert f"{4 * num_new} test rows are new" in str(warnings[0])
    assert "Are their labels right?" in str(warnings[0])


@pytest.mark.parametrize("new_mean", [0.6, 0.7])
def test_rows_like_the_others_cause_no_warning(new_mean: float) -> None:
    assert sum(night(30, new_mean, seed) is not None for seed in range(500)) <= 2


def test_rows_of_one_group_count_once() -> None:
    """Forty rows of one bad document are a single bad document."""
    draw = np.random.default_rng(0)
    values = np.concatenate([rows(100, 0.6, draw), np.zeros(40), rows(MIN_GROUPS, 0.6, draw)])
    groups = [str(row // ROWS_PER_GROUP) for row in range(400)] + ["one"] * 40
    groups += [f"new {row // ROWS_PER_GROUP}" for row in range(ROWS_PER_GROUP * MIN_GROUPS)]
    assert warning("ndcg@10", values, groups, np.arange(len(values)) >= 400) is None


@pytest.mark.parametrize("num_new", [0, 1, MIN_GROUPS - 1])
def test_too_few_groups_cause_no_warning(num_new: int) -> None:
    assert night(num_new, 0.0, 0) is None
    assert night(30, 0.0, 0, num_old=num_new) is None


def test_rows_without_any_spread() -> None:
    values = np.concatenate([np.ones(10), np.zeros(10)])
    groups = [str(row) for row in range(20)]
    assert warning("ndcg@10", values, groups, np.arange(20) >= 10) is not None
    assert warning("ndcg@10", np.ones(20), groups, np.arange(20) >= 10) is None


def test_new_rows_are_those_that_the_earlier_version_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from storage: two versions of a dataset, and a model's results on the second."""
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    storage = open_storage(str(tmp_path / "store"))
    files = [tiny_model.write_triplets(tmp_path / f"{number}.jsonl", 200 * (number + 1)) for number in range(2)]
    before = build_version(files[:1], storage, "tiny", IngestOptions(group="group"), fractions=(0.4, 0.1, 0.5)).manifest
    append(files[1:], storage, "tiny", IngestOptions(group="group"))
    model_dir = tiny_model.tiny_bert(tmp_path / "model", tiny_model.all_texts())
    _, plan = survey(Config.model_validate(tiny_model.recipe(model_dir, storage.uri)), "a-run")
    assert plan.dataset_version != before.version
    known = set(load_split(storage, before, "test", tmp_path / "cache", ["anchor"])["anchor"])
    rows = load_split(storage, read_manifest(storage, "tiny"), "test", tmp_path / "cache")
    anchors = list(dict.fromkeys(rows["anchor"]))
    assert 0 < len(known) < len(anchors)
    draw = np.random.default_rng(0)
    values = [float(0.6 + 0.1 * draw.standard_normal()) if anchor in known else 0.0 for anchor in anchors]
    folder = tmp_path / "results"
    folder.mkdir()
    pq.write_table(pa.table({"anchor": anchors, "ndcg@10": values}), folder / "test-queries.parquet")
    measurement = Measurement(
        request=Request(role=BASE_MODEL, commit=None, out_of_domain={}),
        files=upload_files(storage, folder, "runs/a-run/comparison/base"),
        num_corpus_texts=1,
        seconds_per_text=1.0,
        num_non_finite_weights=0,
        num_leaked_rows=0,
    )
    model = MeasuredModel(measurement, storage, "a-run")
    warned = label_warning(plan, before.version, model)
    assert f"{len(anchors) - len(known)} test rows are new" in str(warned)
    assert label_warning(plan, plan.dataset_version, model) is None
    assert label_warning(plan, None, model) is None
