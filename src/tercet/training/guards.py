"""What ends a run that cannot come out well: bad numbers, weights that do not move, ranks that differ or hang."""

# ruff: noqa: ARG002 - a callback is given more than it needs

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from tercet.errors import LearnedNothing, NonFiniteError, TrainingError
from tercet.evaluation.evaluators import NOT_FINITE_HINT
from tercet.model.collectives import gather_objects
from tercet.model.sharding import local_values, reshard

logger = logging.getLogger("tercet")

# After so many steps with a learning rate above zero, a weight that still is bit for bit the first one will not move.
LEARNED_NOTHING_STEPS = 5
# What telling storage of a hang may take.
HANG_REPORT_SECONDS = 20.0
# A weight of 0 moves at any learning rate above 0, by 1e-30 if need be. That is no sign of learning: 1e-12 is.
SMALLEST_SQUARE = 1e-24


class NonFiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Stops at the first loss, gradient or weight that is NaN or Inf, and says which of them, and of what parameter.

    No step waits for the device: of the first step that is not finite, the loss and the norm of each gradient stay
    there until the training waits in any case, to log, evaluate or save. Weights are looked at then. So nothing of such
    a step is committed. What it spoiled after it is not told.

    All ranks stop, with the same words."""

    def __init__(self, device: torch.device, scales_loss: bool = False) -> None:
        """device: of this rank. scales_loss: gradients are scaled up to fit into 16 bits, and steps skipped where that
        was too much (fp16): gradients are not looked at."""
        self._device, self._scales_loss = device, scales_loss
        self._loss: torch.Tensor | None = None
        self._names: list[str] = []
        self._norms: list[torch.Tensor] = []
        self._record: torch.Tensor | None = None  # of a step: its number, loss, norm of each gradient, norm of them all

    def add_loss(self, loss: torch.Tensor) -> None:
        """Of a micro-batch, on this rank."""
        self._loss = loss if self._loss is None else self._loss + loss

    def add_gradients(self, model: torch.nn.Module) -> torch.Tensor:
        """Before they are clipped, which makes all of them NaN where one is. Returns the norm of what this rank holds
        of each parameter's gradient, 0 where there is none."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        none = torch.zeros((), device=self._device)
        self._names = [name for name, _ in named]
        self._norms = [self._norms_of([none if p.grad is None else local_values(p.grad) for _, p in named])]
        return self._norms[0]

    def close_step(self, step: int, norm: Any) -> None:
        """All of its losses and gradients were added; `norm` is of all gradients together, of FSDP2 this rank's."""
        assert self._loss is not None
        numbers = [torch.full((1,), step, device=self._device), self._loss.reshape(1)]
        if not self._scales_loss:
            norm = local_values(norm) if isinstance(norm, torch.Tensor) else torch.tensor(norm, device=self._device)
            numbers += [*self._norms, norm.reshape(1)]
        now = torch.cat([number.float() for number in numbers])
        before = now if self._record is None else self._record
        self._record = torch.where(before.isfinite().all(), now, before)
        self._loss, self._norms = None, []

    def check(self, step: int, model: torch.nn.Module) -> None:
        """Raises NonFiniteError. A collective: all ranks call it after the same step."""
        reshard(model)
        weights = self._norms_of([local_values(parameter) for parameter in model.parameters()])
        record = weights[:0] if self._record is None else self._record
        bad = 1 - torch.cat([weights, record]).isfinite().all().float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bad:
            named = zip((name for name, _ in model.named_parameters()), weights.tolist(), strict=True)
            found = gather_objects(self._first(record.tolist(), step, dict(named)))
            raise NonFiniteError(min(filter(None, found))[1], hint=NOT_FINITE_HINT)

    def _norms_of(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Of each, in fp32. As torch's `clip_grad_norm_` computes them."""
        return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).to(self._device)

    def _first(self, record: list[float], step: int, weights: dict[str, float]) -> tuple[int, str] | None:
        """The place and the words of what was wrong first, if anything is on this rank. Of gradients that is the last
        of the model: backward they spread from there."""
        gradients = [(f"the gradient of {name}", norm) for name, norm in zip(self._names, record[2:], strict=False)]
        told = [*zip(["the loss"], record[1:], strict=False), *reversed(gradients)]
        if len(record) > 2:
            told.append(("the norm of all gradients together", record[-1]))
        told = [(f"step {record[0]:.0f}: {what}", value) for what, value in told]
        told += [(f"after step {step}: the weight {name}", value) for name, value in weights.items()]
        wrong = ((place, f"{text} is {value}") for place, (text, value) in enumerate(told) if not math.isfinite(value))
        return next(wrong, None)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.check(state.global_step, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.check(state.global_step, model)


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends a process that hangs, with the stacks of all its threads in its log, so that it can be started again.

    A thread of its own says so first. Where that cannot run, because what hangs holds the interpreter, Python's
    faulthandler ends the process a little later: its watch does not need one."""

    def __init__(self, seconds: float, rank: int = 0, on_hang: Callable[[], None] = lambda: None) -> None:
        """seconds: for the longest of a step, an evaluation and a checkpoint. on_hang: called last."""
        self._seconds, self._rank, self._on_hang = seconds, rank, on_hang
        self._ended = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin_anew(args, state, control)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _begin_anew(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + HANG_REPORT_SECONDS, exit=True)

    on_step_end = on_evaluate = on_prediction_step = on_save = _begin_anew

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        message = "no step within %g s on rank %d; where each of its threads is:\n%s"
        logger.error(message, self._seconds, self._rank, _stacks())
        self._on_hang()
        os._exit(1)


def _stacks() -> str:
    """Of all threads. To be written in one piece: ranks that share a log hang at the same moment, and faulthandler,
    which writes word by word, mixed up their lines."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


class LearningGuard(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose weights do not change (frozen model, optimizer over a copy, learning rate 0, detached loss), or
    whose ranks do not hold the same weights (gradients that are not averaged: each rank trains a model of its own).

    Compares, bit for bit, the sum of squares of every parameter with its value at the start, and among the ranks up to
    rounding. Reads all parameters twice, once at the start and once a few steps in."""

    def __init__(self, sharded: bool = False) -> None:
        """sharded: each rank holds a part of the weights, so there is nothing to compare among ranks."""
        self._sharded = sharded
        self._start: torch.Tensor | None = None
        self._start_step = 0
        self._checked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._start, self._start_step = _fingerprint(model), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        num_steps = state.global_step - self._start_step
        if self._checked or num_steps < LEARNED_NOTHING_STEPS:
            return
        self._checked = True
        assert self._start is not None
        now = _fingerprint(model)
        ranks = [now] if self._sharded else gather_objects(now)
        if any(not torch.allclose(rank, ranks[0], rtol=1e-6, atol=0.0, equal_nan=True) for rank in ranks):
            raise TrainingError(
                f"after {num_steps} steps the ranks hold different weights: gradients are not averaged among them",
                hint="this is a fault of tercet or of the installed accelerate; a run on one worker is right",
            )
        if not ((now != self._start) & ((self._start > 0) | (now > SMALLEST_SQUARE))).any():
            raise LearnedNothing(
                f"no weight moved in the first {num_steps} steps: this run would learn nothing",
                hint="is the model frozen, the learning rate 0, or the optimizer built over other parameters?",
            )


def _fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """One sum of squares per parameter, in double precision on the parameter's own device."""
    reshard(model)
    with torch.no_grad():
        return torch.stack([local_values(p).double().square().sum().cpu() for p in model.parameters()])
