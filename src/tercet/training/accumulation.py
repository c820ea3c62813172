"""How many micro-batches make a step: what the recipe says, or as few as the memory of a GPU allows (`auto`).

`auto` begins with one. The longest micro-batch of the run is tried before the first step; while it does not fit, the
run starts again with more and smaller micro-batches. The number that fits is stored with the run, which keeps it.
"""

from __future__ import annotations

import logging
from typing import Any

from tercet.config.recipe import rows_per_rank_and_micro_batch
from tercet.data.longest_batches import longest_micro_batches, text_bytes
from tercet.errors import BatchTooLarge, StartAgain
from tercet.model.collectives import wait_for_all_ranks
from tercet.planning.estimates import is_16_bit
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, seal, unseal
from tercet.training.attempt import HeldRun
from tercet.training.longest_batch import try_longest_batch

logger = logging.getLogger("tercet")

_CACHED = {
    name: f"Cached{name}"
    for name in ("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "GISTEmbedLoss")
}


class Accumulation(Document):
    """The micro-batches per step of a run whose recipe says `auto`."""

    gradient_accumulation_steps: int
    fits: bool
    """Whether the longest micro-batch was tried and fitted. Until then the number may grow."""
    reason: str


def resolve_accumulation(plan: TrainPlan, storage: Storage) -> tuple[TrainPlan, bool]:
    """Return the plan with its number of micro-batches, and whether the recipe says `auto`; then it is the number that
    the run has come to so far.

    Raises CorruptObject where the stored number is damaged."""
    if plan.config.training.gradient_accumulation_steps != "auto":
        return plan, False
    choice = read_accumulation(storage, plan.run_id)
    return _with_steps(plan, choice.gradient_accumulation_steps if choice else 1), True


def read_accumulation(storage: Storage, run_id: str) -> Accumulation | None:
    """Return the stored number of micro-batches of a run; None if there is none.

    Raises CorruptObject where it is damaged."""
    key = layout.accumulation_key(run_id)
    if not storage.exists(key):
        return None
    return unseal(Accumulation, storage.read(key), storage.uri_of(key), hint="choose a new --run-id")


def _with_steps(plan: TrainPlan, steps: int) -> TrainPlan:
    training = plan.config.training.model_copy(update={"gradient_accumulation_steps": steps})
    config = plan.config.model_copy(update={"training": training})
    rows = rows_per_rank_and_micro_batch(config)
    return plan.model_copy(update={"config": config, "rows_per_rank_and_micro_batch": rows})


def more_steps(plan: TrainPlan) -> int | None:
    """Return the next larger number of micro-batches, at least twice as many, that any number of the plan's workers can
    share the global batch with; None if there is none."""
    training = plan.config.training
    for steps in range(2 * training.num_micro_batches, training.global_batch_size + 1):
        if all(training.global_batch_size % (steps * size) == 0 for size in plan.world_sizes):
            return steps
    return None


class BatchTrial:
    """Tries the longest micro-batch of a run before its first step, where that is asked for."""

    def __init__(self, plan: TrainPlan, run: HeldRun, decides: bool) -> None:
        """plan: with its number of micro-batches named. decides: whether the recipe leaves that number to the trial."""
        self._plan, self._run, self._decides = plan, run, decides
        self.peak_bytes: int | None = None
        """Most memory of the device that this rank used in the trial; None without one, or on a CPU."""

    def __call__(self, trainer: Any) -> None:
        """Run the trial for a trainer whose model and optimizer are wrapped. Every rank must call it.

        Raises BatchTooLarge where the micro-batch does not fit; StartAgain where it then decided for smaller ones."""
        if not self._is_needed(trainer):
            return
        plan = self._plan
        try:
            self.peak_bytes = try_longest_batch(
                trainer, lambda: self._candidates(trainer), plan.config.workers.step_timeout_seconds
            )
        except BatchTooLarge as error:
            steps = more_steps(plan) if self._decides and self._run.commit is None else None
            if steps is None:
                raise BatchTooLarge(error.message, hint=what_helps(plan)) from error
            self._store(trainer, steps, False, error.message)
            if not error.left_group:
                wait_for_all_ranks()  # until rank 0 has stored it
            again = StartAgain(
                f"training.gradient_accumulation_steps: auto is {steps} now",
                hint="run the same command again: the number is stored with the run",
            )
            again.needs_new_processes = error.left_group
            raise again from error
        if self._decides:
            self._store(trainer, plan.config.training.num_micro_batches, True, "the longest micro-batch fits")

    def _is_needed(self, trainer: Any) -> bool:
        wanted, commit = self._plan.config.workers.try_longest_batch, self._run.commit
        if wanted == "auto":
            wanted = trainer.args.device.type == "cuda"
        # A number that the trial decided is right for any number of workers: see `_candidates`.
        is_tried = commit is not None and (self._decides or commit.attempt.world_size == trainer.args.world_size)
        return wanted and not is_tried

    def _candidates(self, trainer: Any) -> list[list[int]]:
        batches = trainer._batches
        # A number of micro-batches that is to be kept must be right for the fewest workers too.
        world_size = self._plan.world_sizes[0] if self._decides else batches.world_size
        longest = longest_micro_batches(
            batches.datasets,
            text_bytes(trainer.train_dataset),
            self._plan.config.training.num_epochs,
            batches.global_batch_size,
            batches.gradient_accumulation_steps,
            world_size,
            batches.seed,
            batches.row_tokens,
            trainer.model.max_seq_length if hasattr(trainer.model, "max_seq_length") else None,
            batches.copies_last,
        )
        return [rows.tolist() for rows in longest]

    def _store(self, trainer: Any, steps: int, fits: bool, reason: str) -> None:
        """Store the number on rank 0. Not a collective: the process group may be lost."""
        if trainer.args.process_index == 0:
            self._run.confirm()
            if not fits:
                logger.warning("%s; starting again with %d micro-batches a step", reason, steps)
            choice = Accumulation(gradient_accumulation_steps=steps, fits=fits, reason=reason)
            self._run.storage.put(layout.accumulation_key(self._plan.run_id), seal(choice))


def what_helps(plan: TrainPlan) -> str:
    """Return three ways to need less memory, best first."""
    training, loss, workers = plan.config.training, plan.config.loss, plan.config.workers
    ways = []
    if not loss.compares_rows and (steps := more_steps(plan)) is not None:
        ways.append(f"training.gradient_accumulation_steps: {steps}")
    if loss.name in _CACHED:
        ways.append(f"loss.name: {_CACHED[loss.name]}")
    if loss.is_cached:
        ways.append("a smaller loss.mini_batch_size")
    if not training.gradient_checkpointing:
        ways.append("training.gradient_checkpointing: true")
    if not is_16_bit(training):
        ways.append("training.precision: bf16")
    if plan.parallelism == "ddp" and workers.num_workers > 1:
        ways.append("workers.parallelism: zero3")
    ways += ["a smaller model.max_seq_length", "a smaller training.global_batch_size", "a GPU with more memory"]
    return "any of these helps: " + "; ".join(ways[:3])
