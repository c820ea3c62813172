"""Cuts texts, sorted by length, into groups of similar length.

`attention_groups` are the batches of attention matrices of a row; `chunks` are the padded chunks of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tercet.planning.packing import NUM_CHUNKS

# The fixed cost of a group, as the number of scores (pairs of positions) that take as long. Measured on one busy CPU,
# for 12 heads of width 32 (docs/log.md); a factor of two hardly mattered.
PAIRS_PER_GROUP = 4_000

Costs = npt.NDArray[np.float64]


class Group(NamedTuple):
    """Texts `start` to `stop` (exclusive) in the order of length; the longest has `width` tokens."""

    start: int
    stop: int
    width: int


def attention_groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Cut ascending lengths into groups of texts that share a batch of matrices, at the lowest cost."""
    widths, first = np.unique(np.asarray(lengths), return_index=True)
    ends = np.append(first, len(lengths))

    def costs(stop: int) -> Costs:
        num_texts = ends[stop] - ends[:stop]
        result: Costs = PAIRS_PER_GROUP + num_texts * float(widths[stop - 1]) ** 2
        return result

    cuts = _cheapest_cuts(len(widths), costs)
    return tuple(Group(int(ends[start]), int(ends[stop]), int(widths[stop - 1])) for start, stop in cuts)


def chunks(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Cut ascending lengths into padded chunks with the fewest tokens, padding included.

    The number of chunks depends only on the number of texts: where weights are sharded, all ranks must run the same
    number of forward passes."""
    num = len(lengths)
    widths = np.asarray(lengths, dtype=np.float64)
    # best[n]: the fewest tokens of the first n texts, in len(starts) chunks
    best = np.concatenate(([0.0], np.arange(1, num + 1) * widths))
    starts: list[npt.NDArray[np.int64]] = [np.zeros(num + 1, dtype=np.int64)]
    for _ in range(1, min(NUM_CHUNKS, num)):
        previous, best = best, np.full(num + 1, np.inf)
        starts.append(np.zeros(num + 1, dtype=np.int64))
        for stop in range(len(starts), num + 1):
            start = np.arange(len(starts) - 1, stop)
            totals = previous[start] + (stop - start) * widths[stop - 1]
            starts[-1][stop] = start[int(totals.argmin())]
            best[stop] = totals.min()
    groups, end = [], num
    for start_of in reversed(starts):
        groups.append(Group(int(start_of[end]), end, int(lengths[end - 1])))
        end = groups[-1].start
    return tuple(reversed(groups))


def _cheapest_cuts(num: int, costs: Callable[[int], Costs]) -> list[tuple[int, int]]:
    """Cut the range 0 to `num` into pieces at the lowest total cost, by dynamic programming.

    costs(stop): cost of each piece that ends at `stop`, by its start from 0 on: shape (stop,)."""
    best, start_of = np.zeros(num + 1), np.zeros(num + 1, dtype=np.int64)
    for stop in range(1, num + 1):
        totals = best[:stop] + costs(stop)
        start_of[stop] = totals.argmin()
        best[stop] = totals.min()
    pieces, stop = [], num
    while stop:
        pieces.append((int(start_of[stop]), stop))
        stop = int(start_of[stop])
    return pieces[::-1]
