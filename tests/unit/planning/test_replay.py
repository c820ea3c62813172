"""Replay: all new rows and a random draw of old ones, in the proportion of the recipe."""

from __future__ import annotations

import numpy as np
import pytest

from support import builders
from tercet.config.sections import ReplayConfig
from tercet.data.manifest import Manifest, Shard
from tercet.planning.dataset_plan import cohorts, draw_counts, kept_rows


def grown(*num_rows: int) -> Manifest:
    """A version whose train split got these numbers of rows, the oldest first, in shards of at most 100."""
    newest = len(num_rows) - 1
    shards = []
    for number, num in enumerate(num_rows):
        for start in range(0, num, 100):
            shards.append(
                Shard(
                    path=f"shards/{number}-{start}",
                    num_rows=min(100, num - start),
                    num_bytes=1,
                    sha256=f"{number}-{start}",
                    version=None if number == newest else f"{number:016x}",
                )
            )
    return builders.manifest().model_copy(
        update={"version": f"{newest:016x}", "splits": {"train": tuple(shards), "eval": (), "test": ()}}
    )


def test_new_rows_are_all_kept_and_old_ones_fill_up() -> None:
    parts = cohorts(grown(1000, 250), grown(1000), ReplayConfig(new_share=0.25))
    assert [(cohort.num_rows, cohort.num_kept_rows, cohort.is_new) for cohort in parts] == [
        (1000, 750, False),
        (250, 250, True),
    ]


def test_rows_of_all_versions_since_the_champion_are_new() -> None:
    """Rows stay new after nights that promoted nothing."""
    parts = cohorts(grown(1000, 60, 40), grown(1000), ReplayConfig(new_share=0.5))
    assert [cohort.num_kept_rows for cohort in parts] == [100, 60, 40]


@pytest.mark.parametrize(
    ("seen", "replay"),
    [(None, ReplayConfig()), (grown(100, 50), ReplayConfig()), (grown(100), None)],
    ids=["no champion", "nothing new", "no replay"],
)
def test_otherwise_all_rows_are_used(seen: Manifest | None, replay: ReplayConfig | None) -> None:
    assert cohorts(grown(100, 50), seen, replay) == ()


def test_recent_rows_are_drawn_more_often() -> None:
    parts = cohorts(grown(400, 400, 400, 210), grown(400, 400, 400), ReplayConfig(half_life_versions=1))
    kept = [cohort.num_kept_rows for cohort in parts]
    assert kept == [30, 60, 120, 210]


def test_older_cohorts_make_up_for_a_small_recent_one() -> None:
    assert draw_counts([100, 100, 10], [0.25, 0.5, 1.0], 100) == [30, 60, 10]
    assert draw_counts([5, 0, 3], [1.0, 1.0, 1.0], 100) == [5, 0, 3]
    assert draw_counts([], [], 10) == []
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_rows = rng.integers(0, 50, size=rng.integers(1, 8)).tolist()
        budget = int(rng.integers(0, 250))
        counts = draw_counts(num_rows, [0.5 ** (age / 2) for age in range(len(num_rows))][::-1], budget)
        assert sum(counts) == min(budget, sum(num_rows))
        assert all(0 <= count <= num for count, num in zip(counts, num_rows, strict=True))


def test_the_draw_depends_on_the_seed_and_the_version() -> None:
    replay = ReplayConfig(new_share=0.5)
    parts = cohorts(grown(1000, 100), grown(1000), replay)
    rows = kept_rows(parts, seed=1)
    assert len(rows) == len(set(rows)) == 200
    assert rows.tolist() == sorted(rows)
    assert rows[100:].tolist() == list(range(1000, 1100))
    assert kept_rows(parts, seed=1).tolist() == rows.tolist()
    others = [kept_rows(parts, seed=2), kept_rows(cohorts(grown(1000, 50, 50), grown(1000), replay), seed=1)]
    assert all(set(rows[:100]) != set(other[:100]) for other in others)
