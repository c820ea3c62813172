"""The order of training rows: (seed, epoch, step, world size) → rows. Pure functions; no other module decides order.

    rows of a dataset → shuffled pass → blocks without duplicates → global batches → mix of datasets → rows of a rank

**Same batches for any number of workers.** An epoch is a sequence of *global* batches, derived from (seed, epoch)
alone. Each rank takes its share of every global batch. So 1, 2 or 64 workers train on the same global batches, and all
ranks take the same number of steps.

**Computed, not stored.** The row at each position of a shuffled pass is the value of a function. A pass is cut into
blocks of about 30,000 rows, and each block can be made without the ones before it. So memory does not grow with the
dataset, and a run that resumes at step k makes one block instead of replaying k steps.

**Whole batches only**, unless a recipe keeps the last one. A pass skips the rows that would fill only part of a last
global batch. Each pass is shuffled differently, so each skips other rows. Where they are kept, the ranks share them as
far as they go (see `MicroBatch`).

**One dataset per global batch.** In-batch negatives therefore come from the same dataset. Each dataset is an endless
sequence of batches, pass after pass. Each epoch continues where the last one stopped: it takes one pass with weight 1,
half a pass with weight 0.5.
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

from tercet.data.no_duplicates import separate_rest, without_duplicates

Rows = npt.NDArray[np.int64]
"""Row numbers, from 0."""
TextIds = Callable[[Rows], npt.NDArray[np.int64]]
"""Rows → numbers that are equal for equal texts: shape (num_rows,) → (num_rows, num_columns)."""
RowTokens = Callable[[Rows], npt.NDArray[np.int64]]
"""Rows → estimated cost of each, in any unit: shape (num_rows,) → (num_rows,)."""

# Rows trade places only within a block to keep equal texts out of a batch. A larger block has more room for that, and
# takes longer to make.
ROWS_PER_BLOCK = 2**15
MIN_STEPS_PER_BLOCK = 64

# Each kind of draw has a random stream of its own.
_PASS_STREAM, _SUBSET_STREAM, _MIX_STREAM = 0, 1, 2
_NUM_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class DatasetRows:
    """A dataset's part in training."""

    num_rows: int
    num_steps_per_epoch: int
    """Global batches that the dataset contributes to each epoch."""
    text_ids: TextIds | None = None
    """None if a text may occur more than once in a batch."""
    keeps_last: bool = False
    """Whether the rows of a pass that do not fill a global batch are a smaller one."""


def num_steps_per_epoch(num_rows: int, global_batch_size: int, weight: float = 1.0, keeps_last: bool = False) -> int:
    """Return the optimizer steps that a dataset contributes to an epoch: `weight` passes of global batches.

    keeps_last: rows that do not fill a last one count as one."""
    return round(weight * (-(-num_rows // global_batch_size) if keeps_last else num_rows // global_batch_size))


def subset(num_rows: int, max_rows: int | None, seed: int, dataset: int = 0, draw: tuple[int, ...] = ()) -> Rows:
    """Choose the rows of a dataset to train on: all, or `max_rows` of them at random. Ascending.

    A larger `max_rows` keeps the rows of a smaller one. dataset: position in the recipe; 0 is the main dataset. draw:
    further key; the choice for each value is independent."""
    if max_rows is None or max_rows >= num_rows:
        return np.arange(num_rows, dtype=np.int64)
    return np.sort(shuffled(np.arange(max_rows), num_rows, (seed, _SUBSET_STREAM, dataset, *draw)))


def shuffled(positions: Rows, num_rows: int, stream: tuple[int, ...]) -> Rows:
    """Return the rows at the given positions (each below `num_rows`) of a shuffle of `num_rows` rows.

    Takes time and memory for the given positions only. A Feistel network, keyed by `stream`, over pairs of digits is a
    bijection of [0, a * b), where a * b is slightly larger than `num_rows`. Results that are not below `num_rows` go
    through it again until they are (cycle walking; Black & Rogaway 2002, "Ciphers with arbitrary finite domains")."""
    keys = np.random.default_rng(stream).integers(2**64, size=_NUM_ROUNDS, dtype=np.uint64)
    high = np.uint64(math.isqrt(max(num_rows - 1, 0)) + 1)
    low = np.uint64(-(-num_rows // int(high)))
    rows = np.asarray(positions).astype(np.uint64)
    is_outside = np.ones(len(rows), dtype=bool)
    while is_outside.any():
        left, right = np.divmod(rows[is_outside], low)
        for number in range(0, _NUM_ROUNDS, 2):
            # Half of the 64 bits, so that the sum does not overflow.
            left = (left + (splitmix64(right ^ keys[number]) >> np.uint64(32))) % high
            right = (right + (splitmix64(left ^ keys[number + 1]) >> np.uint64(32))) % low
        rows[is_outside] = left * low + right
        is_outside = rows >= num_rows
    return rows.astype(np.int64)


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash each value: a bijection of 64 bits in which each bit depends on all others (Steele et al. 2014)."""
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
    keeps_last: bool = False,
) -> Iterator[Rows]:
    """Yield the global batches of one pass over a dataset, from batch `start_step`: each of shape (global_batch_size,),
    or smaller for the last one, with `keeps_last`.

    With `text_ids`, no two rows of a batch share a text. A row that would repeat one trades places with a row of
    another batch of its block, or with a skipped row. If a text is too frequent for that, a few repeats remain, which
    is logged. dataset: position in the recipe.

    Raises TrainingError as `without_duplicates` does, when the block is made."""
    num_steps = num_steps_per_epoch(num_rows, global_batch_size, keeps_last=keeps_last)
    steps_per_block = max(ROWS_PER_BLOCK // global_batch_size, MIN_STEPS_PER_BLOCK)
    for block in range(start_step // steps_per_block, -(-num_steps // steps_per_block)):
        first, end = block * steps_per_block, min((block + 1) * steps_per_block, num_steps)
        # The last block also holds the rows that fill no batch.
        positions = np.arange(first * global_batch_size, num_rows if end == num_steps else end * global_batch_size)
        rows = shuffled(positions, num_rows, (seed, _PASS_STREAM, dataset, pass_number))
        num_whole = min(end, num_rows // global_batch_size) - first
        if text_ids is not None:
            texts = text_ids(rows)
            order = without_duplicates(texts, num_whole, global_batch_size)
            if first + num_whole < end:
                order = separate_rest(texts, order, num_whole, global_batch_size)
            rows = rows[order]
        starts = range(
            max(start_step - first, 0) * global_batch_size, (end - first) * global_batch_size, global_batch_size
        )
        yield from (rows[start : start + global_batch_size] for start in starts)


def mixed_batches(
    datasets: Sequence[DatasetRows], global_batch_size: int, seed: int, epoch: int, start_step: int = 0
) -> Iterator[Rows]:
    """Yield the global batches of an epoch (from 0), from batch `start_step`: each of shape (global_batch_size,), or
    smaller where a dataset keeps the last one of a pass.

    Rows are numbered across the concatenated datasets. If there are several, they take turns in an order drawn from
    (seed, epoch). Raises TrainingError as `global_batches` does."""
    turns = np.repeat(np.arange(len(datasets)), [rows.num_steps_per_epoch for rows in datasets])
    if len(datasets) > 1:
        turns = np.random.default_rng((seed, _MIX_STREAM, epoch)).permutation(turns)
    num_taken = np.bincount(turns[:start_step], minlength=len(datasets))
    offsets = list(itertools.accumulate((rows.num_rows for rows in datasets), initial=0))
    batches = [
        _batches_from(
            rows, epoch * rows.num_steps_per_epoch + int(num_taken[dataset]), global_batch_size, seed, dataset
        )
        for dataset, rows in enumerate(datasets)
    ]
    for dataset in turns[start_step:]:
        yield next(batches[dataset]) + offsets[dataset]


def _batches_from(rows: DatasetRows, first: int, global_batch_size: int, seed: int, dataset: int) -> Iterator[Rows]:
    """Yield the dataset's batches from number `first`, pass after pass, without end. Holds one block at a time."""
    per_pass = num_steps_per_epoch(rows.num_rows, global_batch_size, keeps_last=rows.keeps_last)
    first_pass, start_step = divmod(first, per_pass)
    for pass_number in itertools.count(first_pass):
        yield from global_batches(
            rows.num_rows, global_batch_size, seed, pass_number, rows.text_ids, dataset, start_step, rows.keeps_last
        )
        start_step = 0


def rank_micro_batches(
    global_batch: Rows,
    rank: int,
    world_size: int,
    gradient_accumulation_steps: int,
    row_tokens: RowTokens | None = None,
) -> Rows:
    """Return one rank's rows of a global batch: shape (gradient_accumulation_steps, rows per rank and micro-batch).

    The global batch is cut into micro-batches before these are divided among the ranks. So the rows that meet in one
    forward pass over all ranks do not depend on the number of ranks. With `row_tokens`, each micro-batch is divided so
    that the ranks have about the same amount of work; otherwise by position."""
    if row_tokens is None:
        return global_batch.reshape(gradient_accumulation_steps, world_size, -1)[:, rank]
    micro_batches = global_batch.reshape(gradient_accumulation_steps, -1)
    return np.stack([rows[balance_by_tokens(row_tokens(rows), world_size)[rank]] for rows in micro_batches])


def balance_by_tokens(sizes: npt.NDArray[np.integer], num_ranks: int) -> Rows:
    """Divide rows of the given sizes among ranks, so that each has equally many rows and their sums are about equal.

    Returns positions in `sizes`: shape (num_ranks, rows per rank), each rank's ascending. The largest row comes first;
    each goes to the rank with the smallest sum that still has room (longest processing time first, Graham 1969)."""
    rows_per_rank = len(sizes) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [(0, rank) for rank in range(num_ranks)]
    for position in np.argsort(-sizes, kind="stable").tolist():
        total, rank = heapq.heappop(sums)
        ranks[rank].append(position)
        if len(ranks[rank]) < rows_per_rank:
            heapq.heappush(sums, (total + int(sizes[position]), rank))
    return np.sort(ranks, axis=1)


class MicroBatch(list[int]):
    """The rows that one rank embeds for a micro-batch, and how the ranks share a batch that is not whole."""

    def __init__(
        self,
        rows: Sequence[int],
        weight: float = 1.0,
        shares: tuple[int, ...] | None = None,
        is_copied: bool = False,
        own: list[int] | None = None,
    ) -> None:
        """rows: a rank without any has one of another, so that it takes part in all that the ranks do together.
        weight: of the micro-batch's loss. The trainer divides each loss by the number of micro-batches of a whole
        batch; a smaller batch has fewer, each of which weighs more, and the missing ones weigh 0.
        shares: how many of its rows count, of each rank, where the ranks differ.
        is_copied: every rank has all rows, and computes the loss alone.
        own: rows that this rank records as trained on; all if None. Over all ranks, each row once."""
        super().__init__(rows)
        self.weight, self.shares, self.is_copied = weight, shares, is_copied
        self.own = list(rows) if own is None else own

    @property
    def is_whole(self) -> bool:
        """Whether it is a part of a whole global batch."""
        return self.weight == 1.0 and self.shares is None


def share_last_batch(
    batch: Rows, rank: int, world_size: int, num_micro_batches: int, micro_batch_size: int, copies: bool
) -> Iterator[MicroBatch]:
    """Yield one rank's micro-batches of a global batch that is not whole: as many as of a whole one.

    The rows fill micro-batches of the usual size, over all ranks, of which the last may be smaller: as with the plain
    trainer on one device. copies: every rank gets all rows of a micro-batch, instead of its share."""
    cuts = np.split(batch, range(micro_batch_size, len(batch), micro_batch_size))
    weights = [num_micro_batches / len(cuts)] * len(cuts) + [0.0] * (num_micro_batches - len(cuts))
    # Without rows of its own, a missing micro-batch has one that no rank records.
    cuts += [batch[:1]] * (num_micro_batches - len(cuts))
    for rows, weight in zip(cuts, weights, strict=True):
        parts = [part.tolist() for part in np.array_split(rows, world_size)]
        own = parts[rank] if weight else []
        if world_size == 1:
            yield MicroBatch(rows.tolist(), weight, own=own)
        elif copies:
            yield MicroBatch(rows.tolist(), weight, tuple(map(len, parts)), is_copied=True, own=own)
        else:
            yield MicroBatch(parts[rank] or rows[:1].tolist(), weight, tuple(map(len, parts)), own=own)


class RankBatches:
    """The batch sampler of one rank: one list of rows per micro-batch of an epoch."""

    def __init__(
        self,
        datasets: Sequence[DatasetRows],
        global_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
        row_tokens: RowTokens | None = None,
        copies_last: bool = False,
    ) -> None:
        """row_tokens: balances the ranks' work; takes rows numbered as in `mixed_batches`. copies_last: all ranks get
        all rows of a batch that is not whole."""
        self.row_tokens, self.copies_last = row_tokens, copies_last
        self.datasets, self.global_batch_size, self.seed = datasets, global_batch_size, seed
        self.gradient_accumulation_steps, self.rank, self.world_size = gradient_accumulation_steps, rank, world_size
        self.epoch = 0
        self.handed_out: deque[MicroBatch] = deque()
        """Micro-batches that were yielded and not trained on yet. The trainer removes each when it trains on it."""
        self._num_skipped_steps = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, of the next iteration."""
        self.epoch = epoch

    def skip(self, num_steps: int) -> None:
        """Start the next iteration after its first `num_steps` steps, without computing their rows.

        An empty list stands for each skipped micro-batch, because accelerate's `skip_first_batches`, which resumes a
        run, counts and discards them."""
        self._num_skipped_steps = num_steps

    def __len__(self) -> int:
        """Return the micro-batches of an epoch: the same on every rank."""
        return sum(rows.num_steps_per_epoch for rows in self.datasets) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        num_skipped, self._num_skipped_steps = self._num_skipped_steps, 0
        yield from ([] for _ in range(num_skipped * self.gradient_accumulation_steps))
        for batch in mixed_batches(self.datasets, self.global_batch_size, self.seed, self.epoch, num_skipped):
            for micro in self.micro_batches(batch):
                self.handed_out.append(micro)
                yield micro

    def micro_batches(self, batch: Rows) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a global batch."""
        steps = self.gradient_accumulation_steps
        if len(batch) < self.global_batch_size:
            size = self.global_batch_size // steps
            yield from share_last_batch(batch, self.rank, self.world_size, steps, size, self.copies_last)
            return
        for micro in rank_micro_batches(batch, self.rank, self.world_size, steps, self.row_tokens):
            yield MicroBatch(micro.tolist())
