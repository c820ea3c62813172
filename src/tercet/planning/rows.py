"""The rows of a plan's datasets on this machine, to train on together; none of them may give answers away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tercet.data.order import DatasetRows, subset
from tercet.data.row_checks import text_hash
from tercet.errors import ConfigError
from tercet.planning.dataset_plan import PlannedDataset, kept_rows
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage

if TYPE_CHECKING:
    from datasets import Dataset

NUM_EXAMPLES = 3
EXAMPLE_CHARS = 80


def load_splits(plan: TrainPlan, storage: Storage) -> dict[str, Dataset]:
    """The three splits of the dataset that the model is measured on, memory-mapped, with the plan's columns."""
    return _load(plan, storage, plan.datasets[0], tuple(plan.num_rows))


def load_train_rows(plan: TrainPlan, storage: Storage, splits: dict[str, Dataset]) -> list[Dataset]:
    """The rows of each dataset that are trained on, in the plan's order, each with its own columns.

    splits: of the dataset that the model is measured on. Raises ConfigError where a row of another one holds an anchor
    or a positive of its eval or test split. Reads every text for that, and holds a hash of each that is held out."""
    train = [splits["train"], *(_load(plan, storage, part, ("train",))["train"] for part in plan.datasets[1:])]
    if len(train) > 1:
        _check_nothing_leaks(plan, splits, train[1:])
    training, chosen = plan.config.training, []
    for number, (part, rows) in enumerate(zip(plan.datasets, train, strict=True)):
        if part.cohorts:
            kept = kept_rows(part.cohorts, training.seed, number)
            kept = kept[subset(len(kept), training.max_train_rows, training.seed, number)]
        else:
            kept = subset(len(rows), training.max_train_rows, training.seed, number)
        chosen.append(rows if len(kept) == len(rows) else rows.select(kept))
    return chosen


def rows_to_order(plan: TrainPlan, train_rows: Sequence[Dataset]) -> list[DatasetRows]:
    """What the order of rows is made from; `train_rows` as `load_train_rows` returns them."""
    from tercet.data.text_stats import text_ids

    no_duplicates = plan.config.training.no_duplicates
    return [
        DatasetRows(len(rows), dataset.steps_per_epoch, text_ids(rows) if no_duplicates else None)
        for dataset, rows in zip(plan.datasets, train_rows, strict=True)
    ]


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """One dataset after the other, in one. A batch has the columns of its own dataset: rows of one may be pairs, those
    of another triplets."""
    from datasets import concatenate_datasets

    if len(datasets) == 1:
        return datasets[0]
    return concatenate_datasets(list(datasets)).with_transform(_own_columns)


def _own_columns(batch: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    """Without the columns that concatenation filled up with nulls. No text of a version is null."""
    return {name: texts for name, texts in batch.items() if any(text is not None for text in texts)}


def _load(plan: TrainPlan, storage: Storage, dataset: PlannedDataset, splits: tuple[str, ...]) -> dict[str, Dataset]:
    from tercet.data.cache import cache_dir_of, load_split
    from tercet.data.versions import read_manifest

    manifest = read_manifest(storage, dataset.name, dataset.version)
    cache_dir = cache_dir_of(plan.config.workers)
    return {name: load_split(storage, manifest, name, cache_dir, list(dataset.columns)) for name in splits}


def _check_nothing_leaks(plan: TrainPlan, splits: dict[str, Dataset], mix: list[Dataset]) -> None:
    held_out = {text_hash(text) for name in ("eval", "test") for pair in _pairs(splits[name]) for text in pair}
    measured, *others = (dataset.name for dataset in plan.datasets)
    found = []
    for name, rows in zip(others, mix, strict=True):
        num_leaked = 0
        examples: list[str] = []
        for pair in _pairs(rows):
            leaked = next((text for text in pair if text_hash(text) in held_out), None)
            num_leaked += leaked is not None
            if leaked is not None and len(examples) < NUM_EXAMPLES and leaked not in examples:
                examples.append(leaked)
        if examples:
            shown = ", ".join(repr(text[:EXAMPLE_CHARS]) for text in examples)
            found.append(
                f"{num_leaked:,} train rows of {name} hold an anchor or a positive of {measured}'s eval or test split, "
                f"such as {shown}"
            )
    if found:
        raise ConfigError(
            "\n".join(found),
            hint="nothing could be proven: take these rows out and shard again, or leave the dataset out of `mix`",
        )


def _pairs(rows: Dataset) -> Iterator[tuple[str, str]]:
    for batch in rows.select_columns(["anchor", "positive"]).iter(batch_size=1000):
        yield from zip(batch["anchor"], batch["positive"], strict=True)
