"""Pure: (seed, epoch, step, world size) → rows. The one place that decides order.

An epoch is a row of *global* batches, made from (seed, epoch) alone. A rank takes its share of each, so 1, 2 or 64
workers see the same global batches, and every rank has the same number of steps. The rows that do not fill a last batch
(less than one global batch) are left out; each pass over a dataset shuffles anew, so each leaves out others.

The place of every row is computed, not stored: a pass is cut into blocks of some 30,000 rows, and any of them is made
without the ones before it. So memory does not grow with the dataset, and a run resumes at step k by making one block.

Each global batch comes from one dataset, so that in-batch negatives are of its kind. A dataset is an endless row of
batches, pass after pass, and each epoch takes the next few: with weight 1 one pass, with weight 0.5 half of one.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tercet.data.no_duplicates import without_duplicates

Rows = npt.NDArray[np.int64]
TextIds = Callable[[Rows], npt.NDArray[np.int64]]
"""Rows → equal numbers for equal texts among them: shape (num_rows,) → (num_rows, num_columns)."""
RowTokens = Callable[[Rows], npt.NDArray[np.int64]]
"""Rows → about how much there is to compute for each: shape (num_rows,) → (num_rows,)."""

# A block is what is looked at together to keep a text from being in a batch twice.
ROWS_PER_BLOCK = 2**15
MIN_STEPS_PER_BLOCK = 64

_PASS_STREAM, _SUBSET_STREAM, _MIX_STREAM = 0, 1, 2
_NUM_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """One dataset's part in the training."""

    num_rows: int
    num_steps_per_epoch: int
    """Global batches that it gives to each epoch."""
    text_ids: TextIds | None = None
    """None where texts may repeat in a batch."""


def num_steps_per_epoch(num_rows: int, global_batch_size: int, weight: float = 1.0) -> int:
    """Optimizer steps that a dataset gives to one epoch of `weight` passes: whole global batches only."""
    return round(weight * (num_rows // global_batch_size))


def subset(num_rows: int, max_rows: int | None, seed: int, dataset: int = 0, *more: int) -> Rows:
    """The rows of a dataset that take part: all, or `max_rows` of them chosen by the seed, in ascending order.

    dataset: its place in the recipe; 0 is the one that the model is measured on. more: makes it another choice."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.sort(shuffled(np.arange(max_rows), num_rows, (seed, _SUBSET_STREAM, dataset, *more)))


def shuffled(places: Rows, num_rows: int, stream: tuple[int, ...]) -> Rows:
    """The rows at these places (each below `num_rows`) of a shuffle of `num_rows` rows that is never made as a whole.

    A Feistel network over pairs of digits (Black & Rogaway 2002, "Ciphers with arbitrary finite domains") is a
    bijection of [0, a * b); the few results that are no row go through it again until they are one. `stream` is the
    key."""
    keys = np.random.default_rng(stream).integers(2**64, size=_NUM_ROUNDS, dtype=np.uint64)
    high = np.uint64(math.isqrt(max(num_rows - 1, 0)) + 1)
    low = np.uint64(-(-num_rows // int(high)))
    found = np.asarray(places).astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], low)
        for number in range(0, _NUM_ROUNDS, 2):
            # Half of 64 bits, so that the sum does not overflow.
            left = (left + (splitmix64(right ^ keys[number]) >> np.uint64(32))) % high
            right = (right + (splitmix64(left ^ keys[number + 1]) >> np.uint64(32))) % low
        found[outside] = left * low + right
        outside = found >= num_rows
    return found.astype(np.int64)


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A hash of each: a bijection of 64 bits in which every bit depends on all (Steele et al. 2014, SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def global_batches(
    num_rows: int,
    global_batch_size: int,
    seed: int,
    pass_number: int,
    text_ids: TextIds | None = None,
    dataset: int = 0,
    start_step: int = 0,
) -> Iterator[Rows]:
    """The rows of the global batches of a pass over a dataset, from batch `start_step` on: each (global_batch_size,).

    With text_ids, no text occurs in two rows of one batch: a row that would repeat one changes places with a row of
    another batch of its block, or with one that is left out. Where a text is too frequent for that, some stay, which is
    logged. dataset: its place in the recipe.

    Raises TrainingError, when a block is due, as `without_duplicates`."""
    num_steps = num_steps_per_epoch(num_rows, global_batch_size)
    steps_per_block = max(ROWS_PER_BLOCK // global_batch_size, MIN_STEPS_PER_BLOCK)
    for block in range(start_step // steps_per_block, -(-num_steps // steps_per_block)):
        first, end = block * steps_per_block, min((block + 1) * steps_per_block, num_steps)
        # The last block has the rows that are left out besides.
        places = np.arange(first * global_batch_size, num_rows if end == num_steps else end * global_batch_size)
        rows = shuffled(places, num_rows, (seed, _PASS_STREAM, dataset, pass_number))
        if text_ids is not None:
            rows = rows[without_duplicates(text_ids(rows), end - first, global_batch_size)]
        batches = rows[: (end - first) * global_batch_size].reshape(end - first, global_batch_size)
        yield from batches[max(start_step - first, 0) :]


def mixed_batches(
    datasets: Sequence[DatasetRows], global_batch_size: int, seed: int, epoch: int, start_step: int = 0
) -> Iterator[Rows]:
    """The global batches of an epoch, from 0, each of one dataset, from batch `start_step` of the epoch on. Rows are
    numbered as if the datasets lay one after another. Several datasets take turns in an order drawn from (seed, epoch).

    Raises as `global_batches`."""
    order = np.repeat(np.arange(len(datasets)), [rows.num_steps_per_epoch for rows in datasets])
    if len(datasets) > 1:
        order = np.random.default_rng((seed, _MIX_STREAM, epoch)).permutation(order)
    taken = np.bincount(order[:start_step], minlength=len(datasets))
    offsets = list(itertools.accumulate((rows.num_rows for rows in datasets), initial=0))
    batches = [
        _batches_from(rows, epoch * rows.num_steps_per_epoch + int(taken[dataset]), global_batch_size, seed, dataset)
        for dataset, rows in enumerate(datasets)
    ]
    for dataset in order[start_step:]:
        yield next(batches[dataset]) + offsets[dataset]


def _batches_from(rows: DatasetRows, first: int, global_batch_size: int, seed: int, dataset: int) -> Iterator[Rows]:
    """The dataset's batches from number `first` on, pass after pass, without end. Holds one block at a time."""
    first_pass, start_step = divmod(first, num_steps_per_epoch(rows.num_rows, global_batch_size))
    for pass_number in itertools.count(first_pass):
        yield from global_batches(
            rows.num_rows, global_batch_size, seed, pass_number, rows.text_ids, dataset, start_step
        )
        start_step = 0


def rank_micro_batches(
    global_batch: Rows,
    rank: int,
    world_size: int,
    gradient_accumulation_steps: int,
    row_tokens: RowTokens | None = None,
) -> Rows:
    """One rank's rows of a global batch: shape (gradient_accumulation_steps, rows per rank and micro-batch).

    The global batch is cut into accumulation steps first, so that the rows which meet in one forward pass over all
    ranks do not depend on the number of ranks. With row_tokens, these are dealt so that no rank waits for another."""
    if row_tokens is None:
        return global_batch.reshape(gradient_accumulation_steps, world_size, -1)[:, rank]
    micro_batches = global_batch.reshape(gradient_accumulation_steps, -1)
    return np.stack([rows[balance_by_tokens(row_tokens(rows), world_size)[rank]] for rows in micro_batches])


def balance_by_tokens(sizes: npt.NDArray[np.integer], num_ranks: int) -> Rows:
    """Which of the rows with these sizes each rank has, so that the ranks' sums are about equal: shape (num_ranks, rows
    per rank). The largest first, each goes to the rank with the least so far that has room (Graham 1969, LPT)."""
    rows_per_rank = len(sizes) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [(0, rank) for rank in range(num_ranks)]
    for place in np.argsort(-sizes, kind="stable").tolist():
        total, rank = heapq.heappop(sums)
        ranks[rank].append(place)
        if len(ranks[rank]) < rows_per_rank:
            heapq.heappush(sums, (total + int(sizes[place]), rank))
    return np.sort(ranks, axis=1)


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
        row_tokens: RowTokens | None = None,
    ) -> None:
        """row_tokens: numbered as `mixed_batches` does; it decides which rank has which rows of a batch."""
        self.row_tokens = row_tokens
        self.datasets, self.global_batch_size, self.seed = datasets, global_batch_size, seed
        self.gradient_accumulation_steps, self.rank, self.world_size = gradient_accumulation_steps, rank, world_size
        self.epoch = 0
        self.handed_out: deque[list[int]] = deque()
        """The rows of the micro-batches that were asked for, until who trains on them takes them out."""
        self._num_skipped_steps = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.epoch = epoch

    def skip(self, num_steps: int) -> None:
        """Begin the next epoch that is asked for after so many steps of it. An empty list stands for each micro-batch
        before: what resumes a run (accelerate's `skip_first_batches`) counts and throws them away."""
        self._num_skipped_steps = num_steps

    def __len__(self) -> int:
        """Micro-batches in an epoch: the same on every rank."""
        return sum(rows.num_steps_per_epoch for rows in self.datasets) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        num_skipped, self._num_skipped_steps = self._num_skipped_steps, 0
        yield from ([] for _ in range(num_skipped * self.gradient_accumulation_steps))
        for batch in mixed_batches(self.datasets, self.global_batch_size, self.seed, self.epoch, num_skipped):
            for micro in rank_micro_batches(
                batch, self.rank, self.world_size, self.gradient_accumulation_steps, self.row_tokens
            ):
                self.handed_out.append(micro.tolist())
                yield self.handed_out[-1]
