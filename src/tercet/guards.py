"""What ends a run that cannot come out well: bad numbers, weights that do not move, ranks that differ or hang."""

# ruff: noqa: ARG002 - a callback is given more than it needs

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from tercet.errors import LearnedNothing, NonFiniteError, TrainingError
from tercet.sharding import local_values, reshard

logger = logging.getLogger("tercet")

# After so many steps with a learning rate above zero, a weight that still is bit for bit the first one will not move.
LEARNED_NOTHING_STEPS = 5
# What telling storage of a hang may take.
SECONDS_TO_SAY_SO = 20.0
# A weight of 0 moves at any learning rate above 0, by 1e-30 if need be. That is no sign of learning: 1e-12 is.
SMALLEST_SQUARE = 1e-24


def finite(metrics: dict[str, Any], what: str) -> dict[str, float]:
    """The numbers as plain floats. Raises NonFiniteError naming the first that is NaN or Inf.

    Plain, because Ray Train 2.60 ends a run over a numpy.float32, and finite, because it lets NaN win as best."""
    plain = {name: float(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{what}: {name} is {value}",
                hint="lower training.learning_rate, raise training.warmup_ratio, or look for broken rows",
            )
    return plain


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Stops at the first logged loss or gradient norm that is NaN or Inf."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers: dict[str, Any] = {name: (logs or {})[name] for name in ("loss", "grad_norm") if name in (logs or {})}
        finite(numbers, f"step {state.global_step}")


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends a process that hangs, with the stacks of all its threads on standard error, so that it can be started again.

    A thread of its own says so first. Where that cannot run, because what hangs holds the interpreter, Python's
    faulthandler ends the process a little later: its watch does not need one."""

    def __init__(self, seconds: float, on_hang: Callable[[], None] = lambda: None) -> None:
        """seconds: for the longest of a step, an evaluation and a checkpoint. on_hang: called before the end."""
        self._seconds, self._on_hang = seconds, on_hang
        self._ended = threading.Event()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin_anew(args, state, control)
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def _begin_anew(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds + SECONDS_TO_SAY_SO, exit=True)

    on_step_end = on_evaluate = on_prediction_step = on_save = _begin_anew

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        self._on_hang()
        logger.error("no step within %g s; where each thread hangs:", self._seconds)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)


class HoldsTheRun(TrainerCallback):  # type: ignore[misc]
    """Stops an attempt that another one has taken the run from: nothing that it does counts any more."""

    def __init__(self, check: Callable[[], None]) -> None:
        """check: raises when the run is lost."""
        self._check = check

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check()


class WeightsMove(TrainerCallback):  # type: ignore[misc]
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
        ranks = [now] if self._sharded else _of_all_ranks(now)
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


def _of_all_ranks(fingerprint: torch.Tensor) -> list[torch.Tensor]:
    if not torch.distributed.is_initialized():
        return [fingerprint]
    gathered: list[list[float]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, fingerprint.tolist())
    return [torch.tensor(values, dtype=torch.double) for values in gathered]


def _fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """One sum of squares per parameter, in double precision on the parameter's own device."""
    reshard(model)
    with torch.no_grad():
        return torch.stack([local_values(p).double().square().sum().cpu() for p in model.parameters()])
