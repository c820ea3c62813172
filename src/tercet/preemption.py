"""A machine that is about to be taken away: all ranks save after the same step, and end.

The notice is SIGTERM for a worker by itself or under torchrun, and a drained node under Ray. It may reach one rank
alone, so the ranks agree after every step: one number each, by the CPUs (gloo), which takes 0.16 ms
between two processes of one machine.
"""

# ruff: noqa: ARG002 - a callback is given more than it needs

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger("tercet")

Notice = Callable[[], bool]


def notice_of_sigterm() -> Notice:
    """Whether SIGTERM came. From now on it does not end this process; to be called in its main thread."""
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    return came.is_set


class SaveAndEnd(TrainerCallback):  # type: ignore[misc]
    """Ends the training with a checkpoint of the step in which a rank got notice."""

    def __init__(self, notice: Notice, steps_per_epoch: int) -> None:
        """notice: whether this rank got it; asked after every step."""
        self._notice, self._steps_per_epoch = notice, steps_per_epoch
        self._group: Any = None
        self.step: int | None = None
        """After which the training ended early; None otherwise."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")  # NCCL's would wait for the GPU

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step is not None or not self._any_rank_got_it() or state.global_step == state.max_steps:
            return
        self.step = state.global_step
        control.should_training_stop = True
        # The last step of an epoch is evaluated and saved in any case.
        control.should_save = control.should_save or self.step % self._steps_per_epoch != 0
        if state.is_world_process_zero:
            logger.warning("step %d  this machine is about to be taken away: saving, and ending", self.step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """transformers takes the place at which it stops for the end of an epoch."""
        if self.step is not None and self.step % self._steps_per_epoch != 0:
            control.should_evaluate = control.should_save = False

    def _any_rank_got_it(self) -> bool:
        got = self._notice()
        if self._group is None:
            return got
        num_ranks = torch.tensor(int(got))
        torch.distributed.all_reduce(num_ranks, group=self._group)
        return bool(num_ranks)
