"""What happens in a training is handed on: evaluations, checkpoints, and a line of progress."""

# ruff: noqa: ARG002 - a callback is given more than it needs

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tercet.checkpoint import Commit
from tercet.crash_point import crash_point
from tercet.evaluation import named
from tercet.guards import finite
from tercet.ledger import Ledger
from tercet.uploader import Uploader

logger = logging.getLogger("tercet")


class Record(TrainerCallback):  # type: ignore[misc]
    """Hands on what happens: evaluations, checkpoints, and a line of progress from rank 0."""

    def __init__(
        self,
        uploader: Uploader,
        ledger: Ledger,
        num_steps: int,
        save_every_steps: int | None,
        on_evaluation: Callable[[int, float, dict[str, float]], None],
        on_commit: Callable[[Commit], None],
    ) -> None:
        self._uploader, self._ledger, self._num_steps = uploader, ledger, num_steps
        self._save_every_steps = save_every_steps
        self._on_evaluation, self._on_commit = on_evaluation, on_commit
        self._metrics: tuple[int, dict[str, float]] = (0, {})
        self._started_at, self._started_step = time.monotonic(), 0
        self.first_step_unix_seconds: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        crash_point("before_step", state.global_step + 1)
        if self.first_step_unix_seconds is None:
            self.first_step_unix_seconds = time.time()
            self._started_at, self._started_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ledger.close_step()
        crash_point("after_step", state.global_step)
        # The end of an epoch has its checkpoint, after its evaluation.
        ends_epoch = state.global_step % (self._num_steps // int(args.num_train_epochs)) == 0
        if self._save_every_steps and state.global_step % self._save_every_steps == 0 and not ends_epoch:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started_at
        step, last, learning_rate = state.global_step, self._num_steps, logs.get("learning_rate", float("nan"))
        rate = (step - self._started_step) / max(seconds, 1e-9)
        left = (last - step) / max(rate, 1e-9)
        text = "step %d/%d  loss %.4f  learning rate %.2e  %.2f steps/s  %.0f s left"
        logger.info(text, step, last, logs["loss"], learning_rate, rate, left)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        found = finite(named(metrics or {}, "eval_"), f"evaluation at step {state.global_step}")
        self._metrics = (state.global_step, found)
        self._on_evaluation(state.global_step, float(state.epoch or 0.0), found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        step, metrics = self._metrics
        of_this_step = metrics if step == state.global_step else {}  # or an older model's would make this one the best
        self._uploader.submit(folder, state.global_step, float(state.epoch), of_this_step, self._on_commit)
