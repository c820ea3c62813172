"""Numbers that are not finite, weights that do not move, and what hangs, end a run."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tercet import guards
from tercet.errors import LearnedNothing, LeaseLost, NonFiniteError, TrainingError
from tercet.guards import LEARNED_NOTHING_STEPS, FiniteLoss, HoldsTheRun, WeightsMove, finite


def test_finite_makes_plain_floats() -> None:
    plain = finite({"a": np.float32(0.5), "b": 1, "c": torch.tensor(2.0)}, "somewhere")
    assert plain == {"a": 0.5, "b": 1.0, "c": 2.0}
    assert {type(value) for value in plain.values()} == {float}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_finite_refuses_by_name(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: loss is (nan|inf|-inf)") as caught:
        finite({"good": 1.0, "loss": value}, "step 7")
    assert "training.learning_rate" in caught.value.hint


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_first_bad_log_line_ends_training(name: str) -> None:
    guard, state = FiniteLoss(), SimpleNamespace(global_step=3)
    guard.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    guard.on_log(None, state, None, logs={"eval_loss": float("nan")})  # that is looked at by the evaluation
    guard.on_log(None, state, None, logs=None)
    with pytest.raises(NonFiniteError, match=f"step 3: {name} is nan"):
        guard.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 2.0, name: float("nan")})


class Run:
    """Plays the trainer: `steps` optimizer steps of a tiny module from `start` on."""

    def __init__(self, start: int = 0) -> None:
        self.guard, self.model, self.state = WeightsMove(), torch.nn.Linear(3, 2), SimpleNamespace(global_step=start)
        self.guard.on_train_begin(None, self.state, None, model=self.model)

    def steps(self, number: int, learning_rate: float) -> None:
        for _ in range(number):
            with torch.no_grad():
                self.model.weight.add_(learning_rate)
            self.state.global_step += 1
            self.guard.on_step_end(None, self.state, None, model=self.model)


@pytest.mark.parametrize("start", [0, 100])
def test_a_frozen_model_is_found(start: int) -> None:
    run = Run(start)
    run.steps(LEARNED_NOTHING_STEPS - 1, learning_rate=0.0)
    with pytest.raises(LearnedNothing, match=f"no weight moved in the first {LEARNED_NOTHING_STEPS} steps"):
        run.steps(1, learning_rate=0.0)


@pytest.mark.parametrize("start", [0, 100])
def test_a_moving_model_is_left_alone(start: int) -> None:
    run = Run(start)
    run.steps(3 * LEARNED_NOTHING_STEPS, learning_rate=1e-3)


def test_moving_once_is_enough_and_the_look_is_taken_once() -> None:
    run = Run()
    run.steps(1, learning_rate=1e-3)
    run.steps(LEARNED_NOTHING_STEPS, learning_rate=0.0)


def train(run: Run, cause: str, num_steps: int) -> None:
    """Real steps of a real optimizer, with something wrong, or nothing."""
    model = run.model
    torch.nn.init.zeros_(model.bias)
    run.guard.on_train_begin(None, run.state, None, model=model)
    if cause == "frozen":
        model.requires_grad_(False)
    trained = copy.deepcopy(model) if cause == "optimizer over a copy" else model
    rates = {"learning rate 0": 0.0, "a learning rate that moves zeros alone": 1e-30}
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rates.get(cause, 1e-5), weight_decay=0.0)
    scale = 3e38 if cause == "overflow at every step" else 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=0.999)
    other = torch.nn.Parameter(torch.ones(1))
    for _ in range(num_steps):
        output = model(torch.ones(4, 3))
        if cause in ("detached loss", "frozen"):
            output = output.detach() * other
        optimizer.zero_grad()
        scaler.scale(100 * output.square().sum()).backward()
        if any(parameter.grad is not None for parameter in trained.parameters()):
            scaler.step(optimizer)
            scaler.update()
        run.state.global_step += 1
        run.guard.on_step_end(None, run.state, None, model=model)


@pytest.mark.parametrize(
    "cause",
    [
        "learning rate 0",
        "a learning rate that moves zeros alone",
        "frozen",
        "detached loss",
        "optimizer over a copy",
        "overflow at every step",
    ],
)
def test_every_cause_of_learning_nothing_is_found_within_ten_steps(cause: str) -> None:
    with pytest.raises(LearnedNothing):
        train(Run(), cause, 10)


def test_nothing_wrong_is_left_alone() -> None:
    train(Run(), "none", 10)


def test_training_nothing_but_zeros_is_training() -> None:
    """As of biases alone, or of LoRA's second matrix."""
    run = Run()
    torch.nn.init.zeros_(run.model.weight)
    torch.nn.init.zeros_(run.model.bias)
    run.guard.on_train_begin(None, run.state, None, model=run.model)
    run.steps(2 * LEARNED_NOTHING_STEPS, learning_rate=1e-9)


@pytest.mark.parametrize(("difference", "ends"), [(0.0, False), (1e-9, False), (1e-3, True)])
def test_ranks_with_models_of_their_own_are_found(
    monkeypatch: pytest.MonkeyPatch, difference: float, ends: bool
) -> None:
    monkeypatch.setattr(guards, "_of_all_ranks", lambda own: [own, own * (1 + difference)])
    run = Run()
    run.steps(LEARNED_NOTHING_STEPS - 1, learning_rate=1e-3)
    if ends:
        with pytest.raises(TrainingError, match="the ranks hold different weights"):
            run.steps(1, learning_rate=1e-3)
    else:
        run.steps(1, learning_rate=1e-3)


DEADLINE = """
import sys, time
from tercet.guards import Deadline
guard = Deadline(2.5)
guard.on_train_begin(None, None, None)
for _ in range(3):
    time.sleep(0.9)
    guard.on_step_end(None, None, None)
if sys.argv[1] == "ends":
    guard.on_train_end(None, None, None)
def hangs():
    time.sleep(5)
hangs()
print("went on")
"""


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_what_hangs_ends_with_its_stacks(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", DEADLINE, how], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (how == "ends")
    assert ("went on" in done.stdout) == (how == "ends")
    assert ("in hangs" in done.stderr) == (how == "hangs")


def test_an_attempt_that_lost_the_run_stops() -> None:
    def check() -> None:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        HoldsTheRun(check).on_step_end(None, None, None)
