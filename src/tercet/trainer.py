"""The trainer: SentenceTransformerTrainer, with tercet's order of rows, checkpoints and guards."""

# ruff: noqa: ARG002 - a callback is given more than it needs

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tercet.checkpoint import Commit, Uploader
from tercet.evaluation import named
from tercet.guards import finite
from tercet.sampling import RankBatches

logger = logging.getLogger("tercet")


class EpochLoader(DataLoader):  # type: ignore[misc]
    """A DataLoader that passes the epoch on to its batch sampler; the trainer calls `set_epoch` where it exists."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.batch_sampler.set_epoch(epoch)


class TercetTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Replaces three methods of sentence-transformers 6.2."""

    def __init__(self, batches: RankBatches, **kwargs: Any) -> None:
        self._batches = batches
        super().__init__(**kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Instead of `BaseTrainer.get_train_dataloader`: a batch sampler that already knows its rank. The original's is
        cut up among ranks by accelerate, which pads or drops the ends, and its NO_DUPLICATES holds within one rank
        only."""
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Instead of `BaseTrainer.add_model_card_callback`: nothing. It encodes examples for a card that tercet
        replaces with its own, which has the results on the test split."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Instead of `BaseTrainer._save`, which believes that only process zero calls it; transformers 5.23 calls it on
        every rank. The model belongs to rank 0; the others own their random state alone."""
        if self.args.should_save:
            super()._save(output_dir, state_dict)


class Record(TrainerCallback):  # type: ignore[misc]
    """Hands on what happens: evaluations, checkpoints, and a line of progress from rank 0."""

    def __init__(
        self,
        uploader: Uploader,
        num_steps: int,
        on_evaluation: Callable[[int, float, dict[str, float]], None],
        on_commit: Callable[[Commit], None],
    ) -> None:
        self._uploader, self._num_steps = uploader, num_steps
        self._on_evaluation, self._on_commit = on_evaluation, on_commit
        self._metrics: dict[str, float] = {}
        self._started_at = time.monotonic()
        self._started_step = 0
        self.first_step_unix_seconds: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.first_step_unix_seconds is None:
            self.first_step_unix_seconds = time.time()
            self._started_at, self._started_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started_at
        rate = (state.global_step - self._started_step) / max(seconds, 1e-9)
        logger.info(
            "step %d/%d  loss %.4f  learning rate %.2e  %.2f steps/s  %.0f s left",
            state.global_step,
            self._num_steps,
            logs["loss"],
            logs.get("learning_rate", float("nan")),
            rate,
            (self._num_steps - state.global_step) / max(rate, 1e-9),
        )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self._metrics = finite(named(metrics or {}, "eval_"), f"evaluation at step {state.global_step}")
        self._on_evaluation(state.global_step, float(state.epoch or 0.0), self._metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._uploader.submit(folder, state.global_step, float(state.epoch), self._metrics, self._on_commit)
