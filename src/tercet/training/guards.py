"""Callbacks that stop a run that cannot succeed: NaN, weights that do not move, ranks that differ or hang."""

# ruff: noqa: ARG002 - callbacks get more arguments than they need

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
from tercet.evaluation.encodings import NOT_FINITE_HINT
from tercet.model.collectives import gather_objects
from tercet.model.sharding import local_values, reshard

logger = logging.getLogger("tercet")

# A weight that is still bit for bit the same after this many steps with a learning rate above 0 will not move.
LEARNED_NOTHING_STEPS = 5
# Time allowed to record the hang in storage before the process is killed.
HANG_REPORT_SECONDS = 20.0
# A weight of 0 moves at any learning rate above 0, if only by 1e-30. That is no sign of learning; 1e-12 is.
SMALLEST_SQUARE = 1e-24


class NonFiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Stops a run when a loss, gradient or weight is NaN or infinite, and names the step and the parameter.

    No step waits for the device. The loss and the gradient norms of the first bad step stay on the device until the
    training waits there anyway: to log, evaluate or save. Weights are checked at that time too, so nothing of a bad
    step is ever committed. What the bad step corrupted afterwards is not reported.

    All ranks stop with the same message."""

    def __init__(self, device: torch.device, scales_loss: bool = False) -> None:
        """device: the one that this rank trains on. scales_loss: the loss is scaled to keep gradients within fp16, and
        a step whose gradients overflow is skipped on purpose; gradients are then not checked."""
        self._device, self._scales_loss = device, scales_loss
        self._loss: torch.Tensor | None = None
        self._names: list[str] = []
        self._norms: list[torch.Tensor] = []
        self._record: torch.Tensor | None = None
        """Numbers of the first bad step, or of the newest: its step, loss, norm of each gradient, norm of all."""

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch of this rank."""
        self._loss = loss if self._loss is None else self._loss + loss

    def add_gradients(self, model: torch.nn.Module) -> torch.Tensor:
        """Take the gradients of a step, before they are clipped: clipping turns all of them into NaN if one is.

        Returns the norm of each trained parameter's gradient, as far as this rank holds it, or 0 where there is none:
        shape (num_parameters,)."""
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        none = torch.zeros((), device=self._device)
        self._names = [name for name, _ in named]
        self._norms = [self._norms_of([none if p.grad is None else local_values(p.grad) for _, p in named])]
        return self._norms[0]

    def close_step(self, step: int, norm: Any) -> None:
        """End a step whose losses and gradients were all added. norm: of all gradients together; with FSDP2, of this
        rank's part of them."""
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
        """Read what was recorded, and check the weights. A collective: all ranks must call it after the same step.

        Raises NonFiniteError, on all ranks, if any number on any rank is not finite."""
        reshard(model)
        weights = self._norms_of([local_values(parameter) for parameter in model.parameters()])
        record = weights[:0] if self._record is None else self._record
        bad = 1 - torch.cat([weights, record]).isfinite().all().float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bad:
            named = zip((name for name, _ in model.named_parameters()), weights.tolist(), strict=True)
            problems = gather_objects(self._first_problem(record.tolist(), step, dict(named)))
            raise NonFiniteError(min(filter(None, problems))[1], hint=NOT_FINITE_HINT)

    def _norms_of(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the norm of each tensor in fp32, computed as in torch's `clip_grad_norm_`: shape (num_tensors,)."""
        return torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]).to(self._device)

    def _first_problem(self, record: list[float], step: int, weights: dict[str, float]) -> tuple[int, str] | None:
        """Return the position and description of the first number on this rank that is not finite, or None.

        record: as `close_step` made it; may be empty. weights: norm of each parameter after `step`. Gradients count
        from the last parameter to the first, because a backward pass spreads NaN in that order."""
        numbers: list[tuple[str, float]] = []
        if record:
            recorded_step, loss, *norms = record
            numbers.append(("the loss", loss))
            if norms:
                *gradient_norms, total_norm = norms
                named = zip(self._names, gradient_norms, strict=False)
                numbers += reversed([(f"the gradient of {name}", norm) for name, norm in named])
                numbers.append(("the norm of all gradients together", total_norm))
            numbers = [(f"step {recorded_step:.0f}: {what}", value) for what, value in numbers]
        numbers += [(f"after step {step}: the weight {name}", value) for name, value in weights.items()]
        problems = (
            (position, f"{what} is {value}")
            for position, (what, value) in enumerate(numbers)
            if not math.isfinite(value)
        )
        return next(problems, None)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in (logs or {}):
            self.check(state.global_step, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.check(state.global_step, model)


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends a process that hangs, so that it can be started again. Logs the stacks of all its threads first.

    A watching thread logs, reports and exits. If that thread cannot run because the hanging code holds the
    interpreter's lock, Python's faulthandler ends the process a little later: it does not need the lock."""

    def __init__(self, seconds: float, rank: int = 0, on_hang: Callable[[], None] = lambda: None) -> None:
        """seconds: time limit of one step, one evaluation or one checkpoint. on_hang: called just before the
        process exits."""
        self._seconds, self._rank, self._on_hang = seconds, rank, on_hang
        self._ended = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restart(args, state, control)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _restart(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + HANG_REPORT_SECONDS, exit=True)

    on_step_end = on_evaluate = on_prediction_step = on_save = _restart

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
    """Return the stacks of all threads as one text.

    It is written to the log in one piece. Ranks that share a log hang at the same time, and their lines would mix if
    faulthandler wrote them word by word."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


class LearningGuard(TrainerCallback):  # type: ignore[misc]
    """Stops a run that learns nothing, or whose ranks train different models.

    Weights do not change when the model is frozen, the optimizer holds a copy, the learning rate is 0, or the loss is
    detached. Ranks hold different weights when gradients are not averaged.

    Compares the sum of squares of every parameter with that at the start, bit for bit, and with that of the other
    ranks, up to rounding. Reads all parameters twice: at the start, and LEARNED_NOTHING_STEPS later."""

    def __init__(self, sharded: bool = False) -> None:
        """sharded: each rank holds another part of the weights, so ranks are not compared."""
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
                hint="this is a fault of tercet or of the installed accelerate; a run on one worker is not affected",
            )
        if not ((now != self._start) & ((self._start > 0) | (now > SMALLEST_SQUARE))).any():
            raise LearnedNothing(
                f"no weight moved in the first {num_steps} steps: this run would learn nothing",
                hint="is the model frozen, is the learning rate 0, or does the optimizer hold other parameters?",
            )


def _fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """Return one sum of squares per parameter, on the CPU: shape (num_parameters,), float64."""
    reshard(model)
    with torch.no_grad():
        return torch.stack([local_values(p).double().square().sum().cpu() for p in model.parameters()])
