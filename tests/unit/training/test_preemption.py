"""A preemption notice ends the training after a step, with a checkpoint, and without an end of the epoch."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tercet.training.callbacks import StopOnPreemption
from tercet.training.worker import notice_of_sigterm


def after_step(guard: StopOnPreemption, step: int) -> TrainerControl:
    """Return what the guard asks the trainer for after a step."""
    control = TrainerControl()
    guard.on_step_end(None, TrainerState(global_step=step, max_steps=20), control)
    return control


def test_nothing_happens_without_a_notice() -> None:
    guard = StopOnPreemption(lambda: False, steps_per_epoch=10)
    guard.on_train_begin(None, None, None)
    control = after_step(guard, 3)
    assert (control.should_save, control.should_training_stop, guard.step) == (False, False, None)
    control = TrainerControl(should_save=True, should_evaluate=True)
    guard.on_epoch_end(None, None, control)
    assert (control.should_save, control.should_evaluate) == (True, True)


def test_a_notice_within_an_epoch() -> None:
    guard = StopOnPreemption(lambda: True, steps_per_epoch=10)
    control = after_step(guard, 13)
    assert (control.should_save, control.should_training_stop, guard.step) == (True, True, 13)
    # transformers treats the step at which it stops as the end of an epoch
    control = TrainerControl(should_save=True, should_evaluate=True)
    guard.on_epoch_end(None, None, control)
    assert (control.should_save, control.should_evaluate) == (False, False)


def test_a_notice_in_the_last_step_of_an_epoch() -> None:
    """It is evaluated and saved as usual: the run could not end without that evaluation."""
    guard = StopOnPreemption(lambda: True, steps_per_epoch=10)
    control = after_step(guard, 10)
    assert (control.should_save, control.should_training_stop, guard.step) == (False, True, 10)
    control = TrainerControl(should_save=True, should_evaluate=True)
    guard.on_epoch_end(None, None, control)
    assert (control.should_save, control.should_evaluate) == (True, True)


def test_a_notice_in_the_last_step_of_all() -> None:
    guard = StopOnPreemption(lambda: True, steps_per_epoch=10)
    control = after_step(guard, 20)
    assert (control.should_training_stop, guard.step) == (False, None)


def test_a_notice_on_one_rank_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank has no notice; another one has."""
    seen = []

    def all_reduce(number: torch.Tensor, group: object) -> None:
        seen.append((number.item(), group))
        number += 1

    fake = SimpleNamespace(is_initialized=lambda: True, new_group=lambda backend: backend, all_reduce=all_reduce)
    monkeypatch.setattr(torch, "distributed", fake)
    guard = StopOnPreemption(lambda: False, steps_per_epoch=10)
    guard.on_train_begin(None, None, None)
    assert after_step(guard, 4).should_training_stop
    assert seen == [(0, "gloo")]
    assert not after_step(guard, 5).should_training_stop  # it has ended


def test_sigterm_is_a_notice() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        notice = notice_of_sigterm()
        assert not notice()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice()
    finally:
        signal.signal(signal.SIGTERM, before)
