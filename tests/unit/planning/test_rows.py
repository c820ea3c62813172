"""The rows of several datasets: each has its own columns, and none holds a text of the eval or test split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import builders
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.manifest import Manifest
from tercet.data.order import subset
from tercet.data.text_stats import estimated_tokens
from tercet.data.versions import read_manifest
from tercet.errors import ConfigError
from tercet.planning.plan import TrainPlan
from tercet.planning.rows import concatenate, load_splits, load_train_rows
from tercet.storage import Storage, open_storage

Publish = Callable[..., Manifest]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


@pytest.fixture
def publish(tmp_path: Path, storage: Storage) -> Publish:
    """Publish rows as a version, by default with all of them in the train split."""

    def publish(name: str, rows: list[dict[str, str]], train_only: bool = True) -> Manifest:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fractions = (1.0, 0.0, 0.0) if train_only else (0.6, 0.2, 0.2)
        columns = {column: column for column in rows[0]}
        return build_version([path], storage, name, IngestOptions(columns=columns), fractions=fractions).manifest

    return publish


def rows(name: str, num_rows: int, *columns: str) -> list[dict[str, str]]:
    return [{column: f"{name} {column} {n}" for column in columns} for n in range(num_rows)]


@pytest.fixture
def plan(tmp_path: Path, storage: Storage, publish: Publish) -> Callable[..., TrainPlan]:
    """Return plans for `poems`, which has triplets, and a mix of datasets that were published before."""
    publish("poems", rows("poems", 100, "anchor", "positive", "negative"), train_only=False)

    def plan(*mix: str, **training: Any) -> TrainPlan:
        sections: dict[str, Any] = {"workers": {"cache_dir": str(tmp_path / "cache")}, "training": training}
        config = builders.config(mix=[{"name": name} for name in mix], **sections)
        return builders.plan_of(config, *(read_manifest(storage, name) for name in ("poems", *mix)), model=None)

    return plan


def refused(plan: TrainPlan, storage: Storage) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_train_rows(plan, storage, load_splits(plan, storage))
    return caught.value


def test_a_single_dataset_is_not_copied(plan: Callable[..., TrainPlan], storage: Storage) -> None:
    splits = load_splits(plan(), storage)
    assert sorted(splits) == ["eval", "test", "train"]
    train = load_train_rows(plan(), storage, splits)
    assert len(train) == 1
    assert train[0].rows is splits["train"] is concatenate(train)
    chosen = load_train_rows(plan(max_train_rows=20), storage, splits)[0].rows
    assert chosen["anchor"] == splits["train"].select(subset(len(splits["train"]), 20, 42))["anchor"]


def test_each_batch_has_the_columns_of_its_own_dataset(
    plan: Callable[..., TrainPlan], storage: Storage, publish: Publish
) -> None:
    publish("docs", rows("docs", 20, "anchor", "positive"))
    publish("faq", rows("faq", 30, "anchor", "positive", "negative_1", "negative_2"))
    made_plan = plan("docs", "faq")
    splits = load_splits(made_plan, storage)
    train = load_train_rows(made_plan, storage, splits)
    assert [part.dataset for part in train] == list(made_plan.datasets)
    assert [len(part.rows) for part in train] == [len(splits["train"]), 20, 30]
    whole = concatenate(train)
    assert whole.column_names == ["anchor", "positive", "negative", "negative_1", "negative_2"]
    first = 0
    for part in (part.rows for part in train):
        numbers = list(range(first, first + len(part)))
        assert whole.__getitems__(numbers) == part.__getitems__(list(range(len(part))))  # what a DataLoader calls
        assert list(whole.__getitems__(numbers[:2])[0]) == part.column_names
        first += len(part)
    assert first == len(whole)


def test_estimated_tokens_of_a_mix(plan: Callable[..., TrainPlan], storage: Storage, publish: Publish) -> None:
    """Some rows are pairs: their negatives are null."""
    publish("docs", [{"anchor": f"é{n} " * n, "positive": "x " * (100 - n)} for n in range(1, 21)])
    for made_plan in (plan("docs"), plan("docs", max_train_rows=15)):
        train = load_train_rows(made_plan, storage, load_splits(made_plan, storage))
        whole = concatenate(train)
        expected = [
            estimated_tokens(part.rows, None)(np.array([n]))[0] for part in train for n in range(len(part.rows))
        ]
        numbers = np.random.default_rng(0).permutation(len(whole))
        assert estimated_tokens(whole, None)(numbers).tolist() == [expected[n] for n in numbers]
        longest = estimated_tokens(whole, 10)(np.arange(len(train[0].rows), len(whole))).max()
        assert longest == 2 * 16 * 10  # at most ten tokens per text


def test_max_train_rows_chooses_in_each_dataset(
    plan: Callable[..., TrainPlan], storage: Storage, publish: Publish
) -> None:
    publish("docs", rows("docs", 50, "anchor", "positive"))
    short = plan("docs", max_train_rows=15)
    train = load_train_rows(short, storage, load_splits(short, storage))
    assert [len(part.rows) for part in train] == [15, 15] == [part.num_train_rows for part in short.datasets]
    full = plan("docs")
    docs = load_train_rows(full, storage, load_splits(full, storage))[1].rows
    assert train[1].rows["anchor"] == docs.select(subset(50, 15, 42, 1))["anchor"]
    assert concatenate(train).__getitems__([15]) == train[1].rows.__getitems__([0])


@pytest.mark.parametrize("split", ["eval", "test"])
@pytest.mark.parametrize("column", ["anchor", "positive"])
@pytest.mark.parametrize("into", ["anchor", "positive"])
def test_a_leaked_text_is_refused(
    plan: Callable[..., TrainPlan], storage: Storage, publish: Publish, split: str, column: str, into: str
) -> None:
    text = load_splits(plan(), storage)[split][column][0]
    bad = rows("docs", 20, "anchor", "positive")
    bad[7][into] = "  " + text.replace(" ", "\t ")
    publish("docs", bad)
    error = refused(plan("docs"), storage)
    assert error.message == (
        f"1 train rows of docs hold an anchor or a positive of poems's eval or test split, such as {bad[7][into]!r}"
    )
    assert "remove these rows" in error.hint


def test_leaks_are_counted_and_three_are_shown(
    plan: Callable[..., TrainPlan], storage: Storage, publish: Publish
) -> None:
    test = load_splits(plan(), storage)["test"]
    bad = rows("docs", 20, "anchor", "positive")
    for number in range(5):
        bad[number] = {"anchor": test["anchor"][number], "positive": test["positive"][number]}
    publish("docs", bad)
    publish("good", rows("good", 20, "anchor", "positive"))
    publish("faq", [*rows("faq", 20, "anchor", "positive"), {"anchor": test["anchor"][0], "positive": "x" * 500}])
    lines = refused(plan("docs", "good", "faq", max_train_rows=10), storage).message.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("5 train rows of docs ")
    assert lines[0].count("poems anchor") == 3
    assert lines[1].startswith("1 train rows of faq ")


def test_texts_that_are_not_leaks(plan: Callable[..., TrainPlan], storage: Storage, publish: Publish) -> None:
    """Texts of the train split, negatives of the eval split, and texts that differ in case."""
    splits = load_splits(plan(), storage)
    good = rows("docs", 20, "anchor", "positive")
    good[0]["anchor"] = splits["train"]["anchor"][0]
    good[1]["positive"] = splits["eval"]["negative"][0]
    good[2]["positive"] = splits["eval"]["positive"][0].upper()
    publish("docs", good)
    assert len(load_train_rows(plan("docs"), storage, splits)) == 2
