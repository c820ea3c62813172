"""Slow searches for the cuts of `tercet.model.text_groups`: over all texts, with no idea of its own but the recurrence.

Runs on a CPU depend to the bit on the cuts, equally cheap ones included, so the fast searches must choose the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tercet.model.text_groups import PAIRS_PER_GROUP, Group
from tercet.planning.packing import NUM_CHUNKS


def slow_attention_groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Return what `attention_groups` returns."""
    widths, first = np.unique(np.asarray(lengths), return_index=True)
    ends = np.append(first, len(lengths))
    best, start_of = np.zeros(len(widths) + 1), np.zeros(len(widths) + 1, dtype=np.int64)
    for stop in range(1, len(widths) + 1):
        costs = PAIRS_PER_GROUP + (ends[stop] - ends[:stop]) * float(widths[stop - 1]) ** 2
        totals = best[:stop] + costs
        start_of[stop] = totals.argmin()
        best[stop] = totals.min()
    groups, stop = [], len(widths)
    while stop:
        groups.append(Group(int(ends[start_of[stop]]), int(ends[stop]), int(widths[stop - 1])))
        stop = int(start_of[stop])
    return tuple(reversed(groups))


def slow_chunks(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Return what `chunks` returns."""
    num = len(lengths)
    widths = np.asarray(lengths, dtype=np.float64)
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
