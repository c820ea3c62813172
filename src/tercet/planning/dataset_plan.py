"""Pure: what a dataset version contributes to training, whole or with old rows replayed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tercet.config.recipe import Config
from tercet.config.sections import DatasetConfig, ReplayConfig
from tercet.data.manifest import Manifest
from tercet.data.order import Rows, num_steps_per_epoch, subset
from tercet.storage.documents import Frozen


@dataclass(frozen=True)
class FoundDataset:
    """A dataset of the recipe, as storage holds it."""

    config: DatasetConfig
    manifest: Manifest
    """Manifest of the version to train on."""
    champion_manifest: Manifest | None = None
    """Manifest of the version that the champion was trained on. Read for replay only, and None if there is none."""


class PlannedDataset(Frozen):
    """A dataset version to train on."""

    name: str
    version: str
    weight: float
    columns: tuple[str, ...]
    num_train_rows: int
    """Rows of its train split that are used (see training.max_train_rows and dataset.replay)."""
    num_dropped_rows: int
    """Rows that one pass over the dataset omits because they do not fill a global batch; others in each pass."""
    steps_per_epoch: int
    cohorts: tuple[Cohort, ...] = ()
    """Cohorts of the train split if old rows are replayed; empty if all rows are used."""

    def text(self) -> str:
        """Return one line for a user."""
        rows = f"{self.name} {self.version}: {self.num_train_rows:,} train rows, weight {self.weight:g}"
        new = sum(cohort.num_rows for cohort in self.cohorts if cohort.is_new)
        of = f" ({new:,} new, of {sum(c.num_rows for c in self.cohorts):,} in all)" if self.cohorts else ""
        return f"{rows}{of}, {self.steps_per_epoch:,} steps an epoch"


def plan_dataset(config: Config, dataset: FoundDataset) -> PlannedDataset:
    """Count the rows and steps that a dataset version contributes, as the recipe asks."""
    batch_size, manifest = config.training.global_batch_size, dataset.manifest
    num_rows = manifest.num_rows["train"]
    parts = cohorts(manifest, dataset.champion_manifest, dataset.config.replay)
    if parts:
        num_rows = sum(cohort.num_kept_rows for cohort in parts)
    num_rows = min(num_rows, config.training.max_train_rows or num_rows)
    keeps_last = config.training.last_batch == "keep"
    return PlannedDataset(
        name=manifest.dataset,
        version=manifest.version,
        weight=dataset.config.weight,
        columns=manifest.text_columns,
        num_train_rows=num_rows,
        num_dropped_rows=0 if keeps_last else num_rows % batch_size,
        steps_per_epoch=num_steps_per_epoch(num_rows, batch_size, dataset.config.weight, keeps_last),
        cohorts=parts,
    )


class Cohort(Frozen):
    """The train rows that one version added; they are consecutive."""

    version: str
    num_rows: int
    num_kept_rows: int
    """Rows that are trained on."""
    is_new: bool
    """Whether the champion was trained without these rows."""


def cohorts(manifest: Manifest, champion_manifest: Manifest | None, replay: ReplayConfig | None) -> tuple[Cohort, ...]:
    """Return the cohorts of the train split, in the order of its rows.

    Empty if all rows are used: without replay, without a champion, or without a new row."""
    if replay is None or champion_manifest is None:
        return ()
    known = {shard.sha256 for shard in champion_manifest.splits["train"]}
    parts = []
    for (version, is_new), shards in itertools.groupby(
        manifest.splits["train"], lambda shard: (shard.version or manifest.version, shard.sha256 not in known)
    ):
        num_rows = sum(shard.num_rows for shard in shards)
        parts.append(Cohort(version=version, num_rows=num_rows, num_kept_rows=num_rows, is_new=is_new))
    num_new_rows = sum(cohort.num_rows for cohort in parts if cohort.is_new)
    if num_new_rows == 0:
        return ()
    old = [index for index, cohort in enumerate(parts) if not cohort.is_new]
    weights = [_weight(len(parts) - 1 - index, replay.half_life_versions) for index in old]
    budget = round(num_new_rows * (1 - replay.new_share) / replay.new_share)
    kept = draw_counts([parts[index].num_rows for index in old], weights, budget)
    for index, num_kept_rows in zip(old, kept, strict=True):
        parts[index] = parts[index].model_copy(update={"num_kept_rows": num_kept_rows})
    return tuple(parts)


def _weight(age: int, half_life_versions: float | None) -> float:
    return 1.0 if half_life_versions is None else 0.5 ** (age / half_life_versions)


def kept_rows(parts: Sequence[Cohort], seed: int, dataset: int = 0) -> Rows:
    """Return the indices of the train rows to use, ascending. Each version draws other old rows.

    dataset: the dataset's position in the plan, so that each dataset has a draw of its own."""
    firsts = itertools.accumulate((cohort.num_rows for cohort in parts), initial=0)
    newest = int(parts[-1].version, 16)
    return np.concatenate(
        [
            first + subset(cohort.num_rows, cohort.num_kept_rows, seed, dataset, draw=(number, newest))
            for number, (first, cohort) in enumerate(zip(firsts, parts, strict=False))
        ]
    )


def draw_counts(num_rows: Sequence[int], weights: Sequence[float], budget: int) -> list[int]:
    """Return how many rows to draw from each cohort: in proportion to rows times weight, at most all of its rows.

    The counts add up to `budget`, or to all rows if there are fewer."""
    counts, left = [0] * len(num_rows), min(budget, sum(num_rows))
    total = sum(num * weight for num, weight in zip(num_rows, weights, strict=True))
    # The heaviest fill up first. What they lack, and what rounding up takes, is shared among the lighter ones.
    for index in sorted(range(len(num_rows)), key=lambda index: -weights[index]):
        share = num_rows[index] * weights[index]
        counts[index] = min(num_rows[index], left, math.ceil(left * share / total)) if total > 0 else 0
        left, total = left - counts[index], total - share
    return counts
