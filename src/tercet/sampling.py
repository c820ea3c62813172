"""Pure: (seed, epoch, step, world size) → rows. The one place that decides order.

An epoch is a list of *global* batches, made from (seed, epoch) alone. A rank takes its slice of each, so 1, 2 or 64
workers see the same global batches, and every rank has the same number of steps. The rows that do not fill a last batch
(less than one global batch) are left out; each pass over a dataset shuffles anew, so each leaves out others.

Each global batch comes from one dataset, so that in-batch negatives are of its kind. A dataset is an endless row of
batches, pass after pass, and each epoch takes the next few: with weight 1 one pass, with weight 0.5 half of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tercet.errors import TrainingError

Rows = npt.NDArray[np.int64]

_PASS_STREAM, _SUBSET_STREAM, _MIX_STREAM = 0, 1, 2


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """One dataset's part in the training."""

    num_rows: int
    num_steps_per_epoch: int
    """Global batches that it gives to each epoch."""
    text_ids: npt.NDArray[np.int64] | None = None
    """As for `global_batches`; None where texts may repeat in a batch."""


def num_steps_per_epoch(num_rows: int, global_batch_size: int, weight: float = 1.0) -> int:
    """Optimizer steps that a dataset gives to one epoch of `weight` passes: whole global batches only."""
    return round(weight * (num_rows // global_batch_size))


def subset(num_rows: int, max_rows: int | None, seed: int, dataset: int = 0) -> Rows:
    """The rows of a dataset that take part: all, or `max_rows` of them chosen by the seed, in ascending order.

    dataset: its place in the recipe; 0 is the one that the model is measured on."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    order = np.random.default_rng((seed, _SUBSET_STREAM, *_place_in_recipe(dataset))).permutation(num_rows)
    return np.sort(order[:max_rows]).astype(np.int64)


def _place_in_recipe(dataset: int) -> tuple[int, ...]:
    """What tells the random numbers of one dataset from another's. The first has the stream that it has alone."""
    return (dataset,) if dataset else ()


def global_batches(
    num_rows: int,
    global_batch_size: int,
    seed: int,
    pass_number: int,
    text_ids: npt.NDArray[np.int64] | None = None,
    dataset: int = 0,
) -> Rows:
    """The rows of every global batch of a pass over a dataset: shape (num_steps, global_batch_size).

    text_ids: shape (num_rows, num_columns), equal numbers for equal texts. With it, no text occurs in two rows of one
    batch: a row that would repeat one waits for the next batch. Linear in rows, except that each waiting row is looked
    at again for every batch. dataset: its place in the recipe.

    Raises TrainingError when texts are so frequent that no such order is found. The search is greedy: close to the
    limit it may miss one that exists."""
    stream = (seed, _PASS_STREAM, pass_number, *_place_in_recipe(dataset))
    order = np.random.default_rng(stream).permutation(num_rows).astype(np.int64)
    num_steps = num_steps_per_epoch(num_rows, global_batch_size)
    if text_ids is None:
        return order[: num_steps * global_batch_size].reshape(num_steps, global_batch_size)
    return _without_duplicates(order, num_steps, global_batch_size, text_ids)


def _without_duplicates(order: Rows, num_steps: int, batch_size: int, text_ids: npt.NDArray[np.int64]) -> Rows:
    batches: list[list[int]] = []
    waiting: list[int] = []
    position = 0
    for _ in range(num_steps):
        num_new = max(batch_size - len(waiting), 0)
        candidate = waiting[:batch_size] + order[position : position + num_new].tolist()
        texts = text_ids[candidate]
        if len(candidate) == batch_size and _rows_are_disjoint(texts):
            waiting = waiting[batch_size:]
            position += num_new
            batches.append(candidate)
            continue
        batch: list[int] = []
        seen: set[int] = set()
        still_waiting: list[int] = []
        for index, row in enumerate(waiting):
            if len(batch) == batch_size:
                still_waiting.extend(waiting[index:])
                break
            _place(row, text_ids, batch, seen, still_waiting)
        while len(batch) < batch_size and position < len(order):
            _place(int(order[position]), text_ids, batch, seen, still_waiting)
            position += 1
        waiting = still_waiting
        batches.append(batch)
    _fill_by_swapping(batches, batch_size, waiting + order[position:].tolist(), text_ids)
    return np.array(batches, dtype=np.int64).reshape(num_steps, batch_size)


def _rows_are_disjoint(texts: npt.NDArray[np.int64]) -> bool:
    return len(np.unique(texts)) == texts.size


def _place(row: int, text_ids: npt.NDArray[np.int64], batch: list[int], seen: set[int], waiting: list[int]) -> None:
    texts = set(text_ids[row].tolist())
    if seen.isdisjoint(texts):
        seen |= texts
        batch.append(row)
    else:
        waiting.append(row)


def _fill_by_swapping(
    batches: list[list[int]], batch_size: int, left_over: list[int], text_ids: npt.NDArray[np.int64]
) -> None:
    """Fill the last batches, for which only repeating rows are left: give such a row to an earlier batch, and take from
    that batch a row that fits here."""

    def texts(rows: list[int]) -> set[int]:
        return set(text_ids[rows].ravel().tolist())

    for batch in batches:
        while len(batch) < batch_size:
            if not _swap_one_in(batch, batches, left_over, text_ids, texts(batch)):
                raise TrainingError(
                    f"found no order of {len(text_ids)} rows in {len(batches)} batches of {batch_size} "
                    "without a text twice in one",
                    hint="lower training.global_batch_size, remove repeated texts, or set training.no_duplicates=false",
                )


def _swap_one_in(
    batch: list[int],
    batches: list[list[int]],
    left_over: list[int],
    text_ids: npt.NDArray[np.int64],
    batch_texts: set[int],
) -> bool:
    for row in left_over:
        row_texts = set(text_ids[row].tolist())
        if batch_texts.isdisjoint(row_texts):
            batch.append(row)
            left_over.remove(row)
            return True
    for row in left_over:
        row_texts = set(text_ids[row].tolist())
        for other in batches:
            if other is batch or len(other) < len(batch):
                continue
            clashing = [index for index, at in enumerate(other) if not row_texts.isdisjoint(text_ids[at].tolist())]
            if len(clashing) > 1:
                continue
            for index in clashing or range(len(other)):
                moved = other[index]
                if batch_texts.isdisjoint(text_ids[moved].tolist()):
                    other[index] = row
                    batch.append(moved)
                    left_over.remove(row)
                    return True
    return False


def mixed_batches(datasets: Sequence[DatasetRows], global_batch_size: int, seed: int, epoch: int) -> Iterator[Rows]:
    """The global batches of an epoch, from 0, each of one dataset. Rows are numbered as if the datasets lay one after
    another. Several datasets take turns in an order drawn from (seed, epoch).

    Raises as `global_batches`, when the first batch of such a pass is due."""
    order = np.repeat(np.arange(len(datasets)), [rows.num_steps_per_epoch for rows in datasets])
    if len(datasets) > 1:
        order = np.random.default_rng((seed, _MIX_STREAM, epoch)).permutation(order)
    offsets = list(itertools.accumulate((rows.num_rows for rows in datasets), initial=0))
    batches = [
        _batches_from(rows, epoch * rows.num_steps_per_epoch, global_batch_size, seed, dataset)
        for dataset, rows in enumerate(datasets)
    ]
    for dataset in order:
        yield next(batches[dataset]) + offsets[dataset]


def _batches_from(rows: DatasetRows, first: int, global_batch_size: int, seed: int, dataset: int) -> Iterator[Rows]:
    """The dataset's batches from number `first` on, pass after pass, without end. Holds one pass at a time."""
    first_pass, skipped = divmod(first, num_steps_per_epoch(rows.num_rows, global_batch_size))
    for pass_number in itertools.count(first_pass):
        batches = global_batches(rows.num_rows, global_batch_size, seed, pass_number, rows.text_ids, dataset)
        yield from batches[skipped:]
        skipped = 0


def rank_micro_batches(global_batch: Rows, rank: int, world_size: int, gradient_accumulation_steps: int) -> Rows:
    """One rank's rows of a global batch: shape (gradient_accumulation_steps, rows per rank and micro-batch).

    The global batch is cut into accumulation steps first, so that the rows which meet in one forward pass over all
    ranks do not depend on the number of ranks."""
    return global_batch.reshape(gradient_accumulation_steps, world_size, -1)[:, rank]


class RankBatches:
    """The batch sampler of one rank: a list of rows for each micro-batch of the epoch set by `set_epoch`."""

    def __init__(
        self,
        datasets: Sequence[DatasetRows],
        global_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.datasets, self.global_batch_size, self.seed = datasets, global_batch_size, seed
        self.gradient_accumulation_steps, self.rank, self.world_size = gradient_accumulation_steps, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches in an epoch: the same on every rank."""
        return sum(rows.num_steps_per_epoch for rows in self.datasets) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for batch in mixed_batches(self.datasets, self.global_batch_size, self.seed, self.epoch):
            for micro in rank_micro_batches(batch, self.rank, self.world_size, self.gradient_accumulation_steps):
                yield micro.tolist()
