"""Cuts texts, sorted by length, into groups of similar length.

`attention_groups` are the batches of attention matrices of a row; `chunks` are the padded chunks of a batch. Both
search over the different lengths, of which there are few, and not over the texts. Costs are whole numbers, so equally
cheap cuts compare as equal: the one whose last group begins earliest is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tercet.planning.packing import NUM_CHUNKS

# The fixed cost of a group, as the number of scores (pairs of positions) that take as long. Measured on one busy CPU,
# for 12 heads of width 32 (docs/log.md); a factor of two hardly mattered.
PAIRS_PER_GROUP = 4_000

# Lengths whose best cuts are searched at once; their cuts bound those of the lengths between. It affects only the time.
LENGTHS_PER_SEARCH = 64

Numbers = npt.NDArray[np.int64]


class Group(NamedTuple):
    """Texts `start` to `stop` (exclusive) in the order of length; the longest has `width` tokens."""

    start: int
    stop: int
    width: int


def attention_groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Cut ascending lengths into groups of texts that share a batch of matrices, at the lowest cost.

    Up to a group of `width` tokens, from text `start` to `stop`, all groups cost `best[start] + PAIRS_PER_GROUP +
    (stop - start) * width ** 2`: for each start, a line over `width ** 2`. `lines` holds the starts whose lines are the
    lowest somewhere, by the width at which they become the lowest (the convex hull trick)."""
    widths, ends = _runs(lengths)
    best, start_of = [0], [0]
    lines, lowest = [0], 0
    bounds = [0, *ends]
    for number, width in enumerate(widths, start=1):
        pairs = width * width
        while lowest + 1 < len(lines) and _at(lines[lowest + 1], pairs, best, bounds) < _at(
            lines[lowest], pairs, best, bounds
        ):
            lowest += 1
        start_of.append(lines[lowest])
        best.append(PAIRS_PER_GROUP + bounds[number] * pairs + _at(lines[lowest], pairs, best, bounds))
        while len(lines) - lowest > 1 and _is_never_lowest(lines[-2], lines[-1], number, best, bounds):
            lines.pop()
        lines.append(number)
    groups, stop = [], len(widths)
    while stop:
        groups.append(Group(bounds[start_of[stop]], bounds[stop], widths[stop - 1]))
        stop = start_of[stop]
    return tuple(reversed(groups))


def _at(start: int, pairs: int, best: list[int], bounds: list[int]) -> int:
    return best[start] - bounds[start] * pairs


def _is_never_lowest(first: int, middle: int, last: int, best: list[int], bounds: list[int]) -> bool:
    """Return whether the line of `last` is at or below that of `middle` wherever this is below that of `first`."""
    rise, run = best[middle] - best[first], bounds[middle] - bounds[first]
    return (best[last] - best[first]) * run <= rise * (bounds[last] - bounds[first])


def chunks(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Cut ascending lengths into padded chunks with the fewest tokens, padding included.

    The number of chunks depends only on the number of texts: where weights are sharded, all ranks must run the same
    number of forward passes.

    Where the last chunk begins depends only on its width. It is the `start` with the least `tokens[start] - start *
    width`, where `tokens` counts those of all chunks before it: the first text of some length, except among the first
    few texts, where an earlier chunk needs texts of the same length."""
    num = len(lengths)
    own, own_ends = _runs(lengths)
    widths, ends = np.array(own), np.array(own_ends)
    firsts = np.concatenate(([0], ends[:-1]))
    tokens = ends * widths  # tokens[n]: the fewest of the first ends[n] texts, in len(starts) chunks
    starts = [np.zeros(len(widths), dtype=np.int64)]
    for num_chunks in range(1, min(NUM_CHUNKS, num)):
        # Shorter texts than these have fewer texts before their end than chunks.
        shortest = int(np.searchsorted(ends, num_chunks))
        best = shortest + _lowest_lines(tokens[shortest:], ends[shortest:], widths)
        is_within = ends[best] >= ends
        start = np.where(is_within, np.maximum(firsts + 1, num_chunks), ends[best])
        before = tokens[best] - (ends[best] - start) * widths[best]
        starts.append(start)
        tokens = before + (ends - start) * widths
    groups, end = [], num
    for start_of in reversed(starts):
        number = int(np.searchsorted(ends, end))
        groups.append(Group(int(start_of[number]), end, own[number]))
        end = groups[-1].start
    return tuple(reversed(groups))


def _lowest_lines(heights: Numbers, slopes: Numbers, places: Numbers) -> Numbers:
    """Return, for each of the ascending places, the first line with the least `height - slope * place`.

    heights, slopes: of each line, with ascending slopes. So the lines of later places are the same or later ones, and
    the search for a few places bounds that for the places between: shape (num_places,)."""
    found = np.zeros(len(places), dtype=np.int64)
    some = np.unique(np.append(np.arange(0, len(places), LENGTHS_PER_SEARCH), len(places) - 1))
    found[some] = (heights - slopes * places[some, None]).argmin(axis=1)
    for low, high in pairwise(some.tolist()):
        lines = slice(int(found[low]), int(found[high]) + 1)
        between = slice(low + 1, high)
        found[between] = lines.start + (heights[lines] - slopes[lines] * places[between, None]).argmin(axis=1)
    return found


def _runs(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the different lengths, and the number of texts up to the end of each."""
    widths, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    return widths.tolist(), counts.cumsum().tolist()
