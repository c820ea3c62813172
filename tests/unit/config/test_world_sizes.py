"""The numbers of workers that a run may continue with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from support import builders
from tercet.cli.screens import plan_text
from tercet.config.recipe import rows_per_rank_and_micro_batch, world_sizes
from tercet.data.order import rank_micro_batches
from tercet.errors import PlanError


@pytest.mark.parametrize(
    ("workers", "batch", "accumulation", "sizes"),
    [
        ({"num_workers": 2}, 32, 1, (2,)),
        ({"num_workers": 3}, 32, 1, ()),
        ({"min": 1, "max": 8}, 32, 1, (1, 2, 4, 8)),
        ({"min": 1, "max": 8}, 24, 2, (1, 2, 3, 4, 6)),
        ({"min": 3, "max": 8}, 32, 1, (4, 8)),
        ({"min": 5, "max": 7}, 32, 1, ()),
        ({"min": 1, "max": 2}, 32, 5, ()),
    ],
)
def test_world_sizes_share_the_batch_evenly(
    workers: dict[str, int], batch: int, accumulation: int, sizes: tuple[int, ...]
) -> None:
    training = {"global_batch_size": batch, "gradient_accumulation_steps": accumulation}
    assert world_sizes(builders.config(workers=workers, training=training)) == sizes


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        ({"min": 2}, "give both min and max, or neither"),
        ({"max": 2}, "give both min and max, or neither"),
        ({"min": 3, "max": 2}, "num_workers 2 is not between min 3 and max 2"),
        ({"min": 2, "max": 4, "num_workers": 8}, "num_workers 8 is not between min 2 and max 4"),
    ],
)
def test_impossible_ranges_are_refused(workers: dict[str, int], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        builders.config(workers=workers)


def plan(**workers: Any) -> Any:
    return builders.plan(training={"global_batch_size": 12}, workers=workers)


def test_the_plan_is_for_the_largest_world_size() -> None:
    made_plan = plan(min=1, max=5)
    assert made_plan.world_sizes == (1, 2, 3, 4)
    assert (made_plan.config.workers.num_workers, made_plan.rows_per_rank_and_micro_batch) == (4, 3)
    assert plan(min=1, max=5, num_workers=2).config.workers.num_workers == 2
    assert type(made_plan).model_validate_json(made_plan.model_dump_json()) == made_plan


def test_every_world_size_has_the_same_batches() -> None:
    made_plan = plan(min=1, max=5)
    batch = np.arange(12)
    for size in made_plan.world_sizes:
        there = made_plan.on(size)
        assert (there.num_steps, there.world_sizes) == (made_plan.num_steps, made_plan.world_sizes)
        assert there.rows_per_rank_and_micro_batch == rows_per_rank_and_micro_batch(there.config) == 12 // size
        rows = [rank_micro_batches(batch, rank, size, 1) for rank in range(size)]
        assert np.concatenate(rows, axis=1).ravel().tolist() == batch.tolist()


def test_memory_is_estimated_for_the_fewest_workers() -> None:
    """Each of them has the most rows, and the largest shard of the model."""
    elastic, alone, four = plan(min=1, max=4), plan(num_workers=1), plan(num_workers=4)
    assert elastic.memory == alone.memory
    assert elastic.memory != four.memory


def test_a_batch_that_no_number_of_workers_can_share() -> None:
    with pytest.raises(PlanError, match="global_batch_size=12 cannot be shared by any of 7 to 9 workers"):
        plan(min=7, max=9)
    with pytest.raises(PlanError, match="fsdp2 needs more than one worker"):
        plan(min=1, max=4, parallelism="fsdp2")
    assert plan(min=2, max=4, parallelism="fsdp2").parallelism == "fsdp2"


def test_the_screen_lists_the_world_sizes() -> None:
    assert "workers      1, 2, 3 or 4: as many as there is room for" in plan_text(plan(min=1, max=5))
    assert "workers      4: as many" in plan_text(plan(min=4, max=5))


def test_the_range_does_not_change_the_run_id() -> None:
    assert plan(min=1, max=4).run_id == plan(num_workers=2).run_id
