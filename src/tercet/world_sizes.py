"""On how many workers a run may go on: as many as the recipe allows and as share its global batch evenly."""

from __future__ import annotations

from tercet.config import Config


def world_sizes(config: Config) -> tuple[int, ...]:
    """The numbers of workers, ascending; empty where none fits."""
    workers, training = config.workers, config.training
    allowed = range(workers.min or workers.num_workers, (workers.max or workers.num_workers) + 1)
    num_rows_to_share, rest = divmod(training.global_batch_size, training.gradient_accumulation_steps)
    return () if rest else tuple(size for size in allowed if num_rows_to_share % size == 0)


def on_world(config: Config, world_size: int) -> Config:
    """The recipe with so many workers."""
    return config.model_copy(update={"workers": config.workers.model_copy(update={"num_workers": world_size})})


def rows_per_rank_and_micro_batch(config: Config) -> int:
    """What meets in one forward pass of one worker."""
    training = config.training
    return training.global_batch_size // (config.workers.num_workers * training.gradient_accumulation_steps)
