"""Pure: what a dataset version gives to the training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from tercet.config.recipe import Config
from tercet.config.sections import DatasetConfig, ReplayConfig
from tercet.data.manifest import Manifest
from tercet.data.order import Rows, num_steps_per_epoch, subset


class PlannedDataset(BaseModel):
    """A dataset version that is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    weight: float
    columns: tuple[str, ...]
    num_train_rows: int
    """Rows of its train split that take part (see training.max_train_rows, and dataset.replay)."""
    num_dropped_rows: int
    """Rows that a pass over it leaves out because they do not fill a global batch; other ones in each pass."""
    steps_per_epoch: int
    cohorts: tuple[Cohort, ...] = ()
    """Of the train split, where old rows are replayed; nothing where all take part."""

    def text(self) -> str:
        """In words."""
        rows = f"{self.name} {self.version}: {self.num_train_rows:,} train rows, weight {self.weight:g}"
        new = sum(cohort.num_rows for cohort in self.cohorts if cohort.is_new)
        of = f" ({new:,} new, of {sum(c.num_rows for c in self.cohorts):,} in all)" if self.cohorts else ""
        return f"{rows}{of}, {self.steps_per_epoch:,} steps an epoch"


def plan_dataset(
    config: Config, part: DatasetConfig, manifest: Manifest, seen: Manifest | None = None
) -> PlannedDataset:
    """What a dataset version gives, as the recipe asks. `seen`: the version of it that the champion was trained on."""
    batch_size, num_rows = config.training.global_batch_size, manifest.num_rows["train"]
    parts = cohorts(manifest, seen, part.replay)
    if parts:
        num_rows = sum(cohort.num_kept_rows for cohort in parts)
    num_rows = min(num_rows, config.training.max_train_rows or num_rows)
    return PlannedDataset(
        name=manifest.dataset,
        version=manifest.version,
        weight=part.weight,
        columns=manifest.text_columns,
        num_train_rows=num_rows,
        num_dropped_rows=num_rows % batch_size,
        steps_per_epoch=num_steps_per_epoch(num_rows, batch_size, part.weight),
        cohorts=parts,
    )


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
