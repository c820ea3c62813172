"""Callbacks that record a training (evaluations, checkpoints, progress) and stop it early (preemption, lost lease)."""

# ruff: noqa: ARG002 - callbacks get more arguments than they need

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tercet.artifacts.best import retain
from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.throughput import Throughput, line_text
from tercet.artifacts.training_log import Evaluation
from tercet.artifacts.uploader import Uploader
from tercet.evaluation.evaluate import recipe_metrics
from tercet.evaluation.evaluators import require_finite
from tercet.failpoints import crash_point
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.storage.documents import seal
from tercet.training.ledger import Ledger
from tercet.training.meter import Meter

logger = logging.getLogger("tercet")

Waiting = Callable[[], contextlib.AbstractContextManager[None]]


class RunRecorder(TrainerCallback):  # type: ignore[misc]
    """Writes evaluations to storage, hands checkpoints to the uploader, and logs the progress.

    Rank 0 writes and logs. Every rank uploads its part of a checkpoint, and reports each evaluation."""

    def __init__(
        self,
        plan: TrainPlan,
        storage: Storage,
        uploader: Uploader,
        ledger: Ledger,
        meter: Meter,
        confirm: Callable[[], None],
        report: Callable[[dict[str, Any]], None] | None = None,
        export: Callable[[Throughput], None] | None = None,
    ) -> None:
        """confirm: raises when another attempt has taken the run over; called before an evaluation is written.
        report: gets the step, epoch and metrics of each evaluation, on every rank. export: gets, at each line of the
        log, the throughput of this rank since the line before, on every rank."""
        self._plan, self._storage, self._uploader, self._ledger = plan, storage, uploader, ledger
        self._meter, self._confirm, self._report, self._export = meter, confirm, report, export
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
        self._meter.close_step()
        crash_point("after_step", state.global_step)
        # The end of an epoch is saved by the trainer, after its evaluation.
        ends_epoch = state.global_step % (self._plan.num_steps // int(args.num_train_epochs)) == 0
        save_every_steps = self._plan.config.checkpoint.every_steps
        if save_every_steps and state.global_step % save_every_steps == 0 and not ends_epoch:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        if self._export is not None:
            self._export(self._meter.own_line)
        if not state.is_world_process_zero:
            return
        seconds = time.monotonic() - self._started_at
        step, last, learning_rate = state.global_step, self._plan.num_steps, logs.get("learning_rate", float("nan"))
        rate = (step - self._started_step) / max(seconds, 1e-9)
        left = (last - step) / max(rate, 1e-9)
        text = "step %d/%d  loss %.4f  learning rate %.2e  %.2f steps/s  %s  %.0f s left"
        line = self._meter.line
        logger.info(text, step, last, logs["loss"], learning_rate, line.steps_per_second, line_text(line), left)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        step, epoch = state.global_step, float(state.epoch or 0.0)
        values = require_finite(recipe_metrics(metrics or {}, "eval_"), f"evaluation at step {step}")
        self._metrics = (step, values)
        entry = {"step": step, "epoch": epoch, **values}
        if state.is_world_process_zero:
            self._confirm()
            self._storage.put(layout.evaluation_key(self._plan.run_id, step), seal(Evaluation.model_validate(entry)))
            logger.info("step %d/%d  eval  %s", step, self._plan.num_steps, _metrics_text(values))
        if self._report is not None:
            self._report(entry)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        step, metrics = self._metrics
        # Never the metrics of an older model: they could make this checkpoint the best.
        own_metrics = metrics if step == state.global_step else {}
        with self._meter.phase("storage"):
            self._uploader.submit(
                folder, state.global_step, float(state.epoch), own_metrics, self._clean_up, self._meter.reading()
            )

    def _clean_up(self, commit: Commit) -> None:
        """Log a commit and delete what it replaces. Called on rank 0, in the uploader's thread."""
        uri = self._storage.uri_of(commit.folder)
        logger.info("step %d/%d  checkpoint committed: %s", commit.step, self._plan.num_steps, uri)
        retain(self._storage, self._plan.run_id, self._plan.metric, self._plan.config.checkpoint.keep_last)


def _metrics_text(metrics: dict[str, float]) -> str:
    """Metrics in one line: `loss 0.1234  ndcg@10 0.5678`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


class StopOnPreemption(TrainerCallback):  # type: ignore[misc]
    """Saves and ends the training after the step in which a rank learns that its machine will be taken away."""

    def __init__(
        self, notice: Callable[[], bool], steps_per_epoch: int, waiting: Waiting = contextlib.nullcontext
    ) -> None:
        """notice: whether this rank's machine will be taken away; called after every step. waiting: entered while this
        rank waits for the others."""
        self._notice, self._steps_per_epoch, self._waiting = notice, steps_per_epoch, waiting
        self._group: Any = None
        self.step: int | None = None
        """Step after which the training ended early; None if it did not."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")  # NCCL's would wait for the GPU

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is not None or not self._any_rank_has_notice() or state.global_step == state.max_steps:
            return
        self.step = state.global_step
        control.should_training_stop = True
        # The trainer evaluates and saves the last step of an epoch anyway.
        control.should_save = control.should_save or self.step % self._steps_per_epoch != 0
        if state.is_world_process_zero:
            logger.warning("step %d  this machine is about to be taken away: saving and stopping", self.step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Skip the evaluation and save of an epoch's end: transformers treats the step at which it stops as one."""
        if self.step is not None and self.step % self._steps_per_epoch != 0:
            control.should_evaluate = control.should_save = False

    def _any_rank_has_notice(self) -> bool:
        got = self._notice()
        if self._group is None:
            return got
        num_ranks = torch.tensor(int(got))
        with self._waiting():
            torch.distributed.all_reduce(num_ranks, group=self._group)
        return bool(num_ranks)


class LeaseGuard(TrainerCallback):  # type: ignore[misc]
    """Stops an attempt after another one has taken over its run: from then on nothing that it writes counts."""

    def __init__(self, check: Callable[[], None]) -> None:
        """check: raises LeaseLost once another attempt has taken over the run."""
        self._check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check()
