"""Load the rows of a plan's datasets on this machine, and check that the mix does not leak held-out texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tercet.config.sections import TrainingConfig
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


@dataclass(frozen=True)
class PlannedRows:
    """The rows of one dataset of a plan that are trained on."""

    dataset: PlannedDataset
    rows: Dataset
    """With the dataset's own columns."""


def load_splits(plan: TrainPlan, storage: Storage) -> dict[str, Dataset]:
    """Load the three splits of the dataset that the model is measured on, memory-mapped, with the plan's columns."""
    return _load(plan, storage, plan.datasets[0], tuple(plan.num_rows))


def load_train_rows(plan: TrainPlan, storage: Storage, splits: dict[str, Dataset]) -> list[PlannedRows]:
    """Load the rows to train on, dataset by dataset in the plan's order.

    splits: the result of `load_splits`. Raises ConfigError if a row of the mix holds an anchor or a positive of the
    eval or test split. With a mix, this reads every text and keeps a hash of each held-out text in memory."""
    measured, *mix = plan.datasets
    mixed = [PlannedRows(dataset, _load(plan, storage, dataset, ("train",))["train"]) for dataset in mix]
    if mixed:
        _check_nothing_leaks(measured, splits, mixed)
    whole = [PlannedRows(measured, splits["train"]), *mixed]
    return [_select(part, plan.config.training, number) for number, part in enumerate(whole)]


def _select(part: PlannedRows, training: TrainingConfig, number: int) -> PlannedRows:
    """Return the rows that the plan uses of a train split. number: the dataset's position in the plan."""
    if part.dataset.cohorts:
        kept = kept_rows(part.dataset.cohorts, training.seed, number)
        kept = kept[subset(len(kept), training.max_train_rows, training.seed, number)]
    else:
        kept = subset(len(part.rows), training.max_train_rows, training.seed, number)
    return part if len(kept) == len(part.rows) else PlannedRows(part.dataset, part.rows.select(kept))


def rows_to_order(plan: TrainPlan, train_rows: Sequence[PlannedRows]) -> list[DatasetRows]:
    """Return what the order of rows is computed from. train_rows: the result of `load_train_rows`."""
    from tercet.data.text_stats import text_ids

    no_duplicates, keeps_last = plan.config.training.no_duplicates, plan.config.training.last_batch == "keep"
    return [
        DatasetRows(
            len(part.rows), part.dataset.steps_per_epoch, text_ids(part.rows) if no_duplicates else None, keeps_last
        )
        for part in train_rows
    ]


def concatenate(train_rows: Sequence[PlannedRows]) -> Dataset:
    """Join the rows of all datasets. Each batch has the columns of its own dataset, so that the rows of one dataset may
    be pairs and those of another triplets."""
    from datasets import concatenate_datasets

    if len(train_rows) == 1:
        return train_rows[0].rows
    return concatenate_datasets([part.rows for part in train_rows]).with_transform(_own_columns)


def _own_columns(batch: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    """Remove the columns that concatenation filled with nulls. No text of a version is null."""
    return {name: texts for name, texts in batch.items() if any(text is not None for text in texts)}


def _load(plan: TrainPlan, storage: Storage, dataset: PlannedDataset, splits: tuple[str, ...]) -> dict[str, Dataset]:
    from tercet.data.cache import cache_dir_of, load_split
    from tercet.data.versions import read_manifest

    manifest = read_manifest(storage, dataset.name, dataset.version)
    cache_dir = cache_dir_of(plan.config.workers)
    return {name: load_split(storage, manifest, name, cache_dir, list(dataset.columns)) for name in splits}


def _check_nothing_leaks(measured: PlannedDataset, splits: dict[str, Dataset], mix: Sequence[PlannedRows]) -> None:
    held_out = {text_hash(text) for name in ("eval", "test") for pair in _pairs(splits[name]) for text in pair}
    problems = []
    for part in mix:
        num_leaked = 0
        examples: list[str] = []
        for pair in _pairs(part.rows):
            leaked = next((text for text in pair if text_hash(text) in held_out), None)
            num_leaked += leaked is not None
            if leaked is not None and len(examples) < NUM_EXAMPLES and leaked not in examples:
                examples.append(leaked)
        if examples:
            shown = ", ".join(repr(text[:EXAMPLE_CHARS]) for text in examples)
            problems.append(
                f"{num_leaked:,} train rows of {part.dataset.name} hold an anchor or a positive of {measured.name}'s "
                f"eval or test split, such as {shown}"
            )
    if problems:
        raise ConfigError(
            "\n".join(problems),
            hint="the evaluation would prove nothing: remove these rows and shard again, or remove the dataset from "
            "`mix`",
        )


def _pairs(rows: Dataset) -> Iterator[tuple[str, str]]:
    for batch in rows.select_columns(["anchor", "positive"]).iter(batch_size=1000):
        yield from zip(batch["anchor"], batch["positive"], strict=True)
