"""Pure: of a version that grew, which rows are trained on: all new ones, and a draw of those that were there before.

A version lists the shards of those before it, so its rows lie in cohorts, the oldest first: what each version added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from tercet.manifest import Manifest
from tercet.sampling import Rows, subset
from tercet.sections import ReplayConfig


class Cohort(BaseModel):
    """The train rows that one version added. They lie together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    num_rows: int
    num_kept_rows: int
    """That are trained on."""
    is_new: bool
    """Whether the champion was trained without them."""


def cohorts(manifest: Manifest, seen: Manifest | None, replay: ReplayConfig | None) -> tuple[Cohort, ...]:
    """The cohorts of the train split in the order of its rows; `seen` is the version that the champion was trained on.
    Nothing where all rows take part: without replay, without a champion, or without a new row."""
    if replay is None or seen is None:
        return ()
    known = {shard.sha256 for shard in seen.splits["train"]}
    found = []
    for (version, is_new), shards in itertools.groupby(
        manifest.splits["train"], lambda shard: (shard.version or manifest.version, shard.sha256 not in known)
    ):
        num_rows = sum(shard.num_rows for shard in shards)
        found.append(Cohort(version=version, num_rows=num_rows, num_kept_rows=num_rows, is_new=is_new))
    num_new_rows = sum(cohort.num_rows for cohort in found if cohort.is_new)
    if num_new_rows == 0:
        return ()
    old = [index for index, cohort in enumerate(found) if not cohort.is_new]
    weights = [_weight(len(found) - 1 - index, replay.half_life_versions) for index in old]
    budget = round(num_new_rows * (1 - replay.new_share) / replay.new_share)
    kept = draw_counts([found[index].num_rows for index in old], weights, budget)
    for index, num_kept_rows in zip(old, kept, strict=True):
        found[index] = found[index].model_copy(update={"num_kept_rows": num_kept_rows})
    return tuple(found)


def _weight(age: int, half_life_versions: float | None) -> float:
    return 1.0 if half_life_versions is None else 0.5 ** (age / half_life_versions)


def kept_rows(found: Sequence[Cohort], seed: int, dataset: int = 0) -> Rows:
    """The numbers of the rows that are trained on, ascending. Each version draws other ones of the old."""
    firsts = itertools.accumulate((cohort.num_rows for cohort in found), initial=0)
    newest = int(found[-1].version, 16)
    return np.concatenate(
        [
            first + subset(cohort.num_rows, cohort.num_kept_rows, seed, dataset, number, newest)
            for number, (first, cohort) in enumerate(zip(firsts, found, strict=False))
        ]
    )


def draw_counts(num_rows: Sequence[int], weights: Sequence[float], budget: int) -> list[int]:
    """How many rows to draw from each cohort: in proportion to rows and weight, but no more than there are; `budget` in
    all, or every row."""
    counts, left = [0] * len(num_rows), min(budget, sum(num_rows))
    total = sum(num * weight for num, weight in zip(num_rows, weights, strict=True))
    # The heaviest are full first. What they cannot give, and what rounding up takes, is shared among the lighter ones.
    for index in sorted(range(len(num_rows)), key=lambda index: -weights[index]):
        share = num_rows[index] * weights[index]
        counts[index] = min(num_rows[index], left, math.ceil(left * share / total)) if total > 0 else 0
        left, total = left - counts[index], total - share
    return counts
