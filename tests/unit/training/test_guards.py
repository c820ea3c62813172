"""A run ends when a number is not finite, when no weight moves, when ranks differ, and when a process hangs."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tercet.errors import LearnedNothing, LeaseLost, NonFiniteError, TrainingError
from tercet.evaluation.evaluators import require_finite
from tercet.training import guards
from tercet.training.callbacks import LeaseGuard
from tercet.training.guards import LEARNED_NOTHING_STEPS, LearningGuard, NonFiniteGuard
from tercet.training.trainer import TercetTrainer


def test_finite_makes_plain_floats() -> None:
    plain = require_finite({"a": np.float32(0.5), "b": 1, "c": torch.tensor(2.0)}, "somewhere")
    assert plain == {"a": 0.5, "b": 1.0, "c": 2.0}
    assert {type(value) for value in plain.values()} == {float}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_finite_refuses_by_name(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: loss is (nan|inf|-inf)") as caught:
        require_finite({"good": 1.0, "loss": value}, "step 7")
    assert "training.learning_rate" in caught.value.hint


NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


class Steps:
    """Plays the trainer around NonFiniteGuard: real steps of a real optimizer, and a log every `log_every` steps."""

    def __init__(self, log_every: int = 5, **settings: bool) -> None:
        torch.manual_seed(0)
        self.guard, self.log_every, self.step = NonFiniteGuard(CPU, **settings), log_every, 0
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def run(self, num_steps: int, cause: str = "", value: float = NAN, at: int = 3) -> None:
        for _ in range(num_steps):
            self.step += 1
            planted = cause if self.step == at else ""
            loss = self.model(torch.ones(4, 3)).square().sum()
            if planted == "loss":
                loss = loss * value
            self.guard.add_loss(loss.detach() / 2)
            self.guard.add_loss(loss.detach() / 2)
            loss.backward()
            for name, parameter in self.model.named_parameters():
                if planted == f"gradient {name}":
                    parameter.grad[0] = value  # type: ignore[index]
            norm = torch.linalg.vector_norm(self.guard.add_gradients(self.model))
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)
            self.guard.close_step(self.step, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if planted == f"weight {name}":
                        parameter[0] = value
            if self.step % self.log_every == 0:
                state = SimpleNamespace(global_step=self.step)
                self.guard.on_log(
                    None, state, None, logs={"eval_loss": 1.0}, model=None
                )  # which is looked at elsewhere
                self.guard.on_log(None, state, None, logs={"loss": 1.0}, model=self.model)

    def save(self) -> None:
        self.guard.on_save(None, SimpleNamespace(global_step=self.step), None, model=self.model)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("cause", ["loss", "gradient 1.weight", "gradient 0.bias", "gradient 2.bias"])
def test_the_first_loss_or_gradient_that_is_not_finite_is_named(cause: str, value: float) -> None:
    """It happens two steps before anything is logged, when all weights are NaN already."""
    steps = Steps()
    steps.run(4, cause, value)
    number = {"loss": str(value)}.get(cause, "nan" if math.isnan(value) else "inf")
    what = cause.replace("gradient", "gradient of")
    with pytest.raises(NonFiniteError, match=f"^step 3: the {what} is {number}$") as caught:
        steps.run(1)
    assert "training.learning_rate" in caught.value.hint


def test_of_several_gradients_the_one_nearest_to_the_loss_is_named() -> None:
    steps = Steps(log_every=1)
    steps.model[1].register_full_backward_hook(lambda _, inputs, __: (inputs[0] * NAN,))
    with pytest.raises(NonFiniteError, match=r"^step 1: the gradient of 0\.bias is nan$"):
        steps.run(1)


def test_gradients_whose_norm_overflows_are_named_too() -> None:
    with pytest.raises(NonFiniteError, match=r"^step 3: the gradient of 1\.weight is inf$"):
        Steps().run(5, "gradient 1.weight", 3e38)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("when", ["log", "save"])
def test_a_weight_that_is_not_finite_is_named(value: float, when: str) -> None:
    steps = Steps()
    if when == "log":
        with pytest.raises(NonFiniteError, match=f"^after step 5: the weight 1.bias is {value}$"):
            steps.run(5, "weight 1.bias", value, at=5)
    else:
        steps.run(4, "weight 1.bias", value, at=4)
        with pytest.raises(NonFiniteError, match=f"^after step 4: the weight 1.bias is {value}$"):
            steps.save()


@pytest.mark.parametrize("cause", ["loss", "gradient 2.bias"])
def test_nothing_that_is_not_finite_is_saved(cause: str) -> None:
    steps = Steps()
    steps.run(2, cause)
    steps.save()
    steps.run(1, cause)
    with pytest.raises(NonFiniteError, match=f"^step 3: the {cause.replace('gradient', 'gradient of')} is nan$"):
        steps.save()


def test_finite_steps_pass() -> None:
    steps = Steps()
    steps.run(20)
    steps.save()


def test_under_loss_scaling_only_the_loss_must_be_finite() -> None:
    """The scaler skips a step whose gradients overflow."""
    steps = Steps(scales_loss=True)
    steps.guard.add_loss(torch.tensor(1.0))
    steps.guard.add_gradients(steps.model)
    steps.guard.close_step(1, INF)
    steps.save()
    steps.run(5)
    with pytest.raises(NonFiniteError, match=r"^step 8: the loss is inf$"):
        steps.run(5, "loss", INF, at=8)


def test_with_deepspeed_only_the_norm_of_all_gradients_is_known() -> None:
    steps = Steps()
    for step, norm in ((1, 0.5), (2, INF), (3, NAN)):
        steps.guard.add_loss(torch.tensor(1.0))
        steps.guard.close_step(step, norm)
    with pytest.raises(NonFiniteError, match=r"^step 2: the norm of all gradients together is inf$"):
        steps.save()


def test_clipping_gives_the_same_bits_as_torch() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 2))
    ours(torch.randn(8, 30)).square().sum().backward()
    theirs = copy.deepcopy(ours)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        other.grad = mine.grad.clone()
    trainer: Any = SimpleNamespace(
        _parallelism="ddp",
        _finite=NonFiniteGuard(CPU),
        model=ours,
        accelerator=SimpleNamespace(unscale_gradients=lambda: None),
        args=SimpleNamespace(max_grad_norm=0.3),
    )
    norm = TercetTrainer._clip_grad_norm(trainer, ours)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3) > 0.3
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)


class Run:
    """Plays the trainer: optimizer steps of a tiny module, counted from `start`."""

    def __init__(self, start: int = 0) -> None:
        self.guard, self.model, self.state = LearningGuard(), torch.nn.Linear(3, 2), SimpleNamespace(global_step=start)
        self.guard.on_train_begin(None, self.state, None, model=self.model)

    def steps(self, number: int, learning_rate: float) -> None:
        for _ in range(number):
            with torch.no_grad():
                self.model.weight.add_(learning_rate)
            self.state.global_step += 1
            self.guard.on_step_end(None, self.state, None, model=self.model)


@pytest.mark.parametrize("start", [0, 100])
def test_a_frozen_model_is_detected(start: int) -> None:
    run = Run(start)
    run.steps(LEARNED_NOTHING_STEPS - 1, learning_rate=0.0)
    with pytest.raises(LearnedNothing, match=f"no weight moved in the first {LEARNED_NOTHING_STEPS} steps"):
        run.steps(1, learning_rate=0.0)


@pytest.mark.parametrize("start", [0, 100])
def test_a_model_that_learns_passes(start: int) -> None:
    run = Run(start)
    run.steps(3 * LEARNED_NOTHING_STEPS, learning_rate=1e-3)


def test_one_change_is_enough_and_weights_are_compared_once() -> None:
    run = Run()
    run.steps(1, learning_rate=1e-3)
    run.steps(LEARNED_NOTHING_STEPS, learning_rate=0.0)


def train(run: Run, cause: str, num_steps: int) -> None:
    """Run real steps of a real optimizer, with the fault that `cause` names, if any."""
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
def test_every_cause_of_learning_nothing_is_detected_within_ten_steps(cause: str) -> None:
    with pytest.raises(LearnedNothing):
        train(Run(), cause, 10)


def test_a_run_without_fault_passes() -> None:
    train(Run(), "none", 10)


def test_training_only_weights_that_start_at_zero_passes() -> None:
    """For example biases, or LoRA's second matrix."""
    run = Run()
    torch.nn.init.zeros_(run.model.weight)
    torch.nn.init.zeros_(run.model.bias)
    run.guard.on_train_begin(None, run.state, None, model=run.model)
    run.steps(2 * LEARNED_NOTHING_STEPS, learning_rate=1e-9)


@pytest.mark.parametrize(("difference", "ends"), [(0.0, False), (1e-9, False), (1e-3, True)])
def test_ranks_that_train_different_models_are_detected(
    monkeypatch: pytest.MonkeyPatch, difference: float, ends: bool
) -> None:
    monkeypatch.setattr(guards, "gather_objects", lambda own: [own, own * (1 + difference)])
    run = Run()
    run.steps(LEARNED_NOTHING_STEPS - 1, learning_rate=1e-3)
    if ends:
        with pytest.raises(TrainingError, match="the ranks hold different weights"):
            run.steps(1, learning_rate=1e-3)
    else:
        run.steps(1, learning_rate=1e-3)


DEADLINE = """
import sys, time
from tercet.training.guards import Deadline
guard = Deadline(8)
guard.on_train_begin(None, None, None)
for _ in range(3):
    time.sleep(2.8)
    guard.on_step_end(None, None, None)
if sys.argv[1] == "ends":
    guard.on_train_end(None, None, None)
def hangs():
    time.sleep(9 if sys.argv[1] == "ends" else 60)
hangs()
print("went on")
"""


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_process_that_hangs_ends_with_its_stacks(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", DEADLINE, how], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (how == "ends")
    assert ("went on" in done.stdout) == (how == "ends")
    assert ("in hangs" in done.stderr) == (how == "hangs")


TOGETHER = """
import sys, threading, time
from pathlib import Path
from tercet.training.guards import Deadline
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
def hangs():
    time.sleep(60)
for _ in range(39):
    threading.Thread(target=hangs, daemon=True).start()
(folder / f"ready{rank}").touch()
while not (folder / "go").exists():
    time.sleep(0.001)
Deadline(0.5, rank).on_train_begin(None, None, None)
hangs()
"""


STORAGE_HANGS_TOO = """
import time
from tercet.training import guards
guards.HANG_REPORT_SECONDS = 10.0
guards.Deadline(1, 3, on_hang=lambda: time.sleep(60)).on_train_begin(None, None, None)
def hangs():
    time.sleep(60)
hangs()
"""


def test_stacks_do_not_wait_for_storage() -> None:
    done = subprocess.run([sys.executable, "-c", STORAGE_HANGS_TOO], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    by_thread, by_faulthandler = done.stderr.split("Timeout (0:00:11)!")
    assert by_thread.startswith("no step within 1 s on rank 3; ")
    assert "thread MainThread:\n" in by_thread
    assert " in hangs\n" in by_thread
    assert " in <lambda>\n" in by_faulthandler


def test_stacks_of_two_ranks_in_one_log_do_not_mix(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-c", TOGETHER]
        ranks = [subprocess.Popen([*command, str(rank), tmp_path], stdout=file, stderr=file) for rank in (0, 1)]
    while len(list(tmp_path.glob("ready*"))) < 2 and all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [rank.wait() for rank in ranks] == [1, 1]
    first, second = log.read_text().split("no step within ")[1:]
    for stacks in first, second:
        assert stacks.count(" in hangs\n") == 40
    assert {first[:19], second[:19]} == {"0.5 s on rank 0; wh", "0.5 s on rank 1; wh"}


def test_an_attempt_that_lost_the_run_stops() -> None:
    def check() -> None:
        raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        LeaseGuard(check).on_step_end(None, None, None)
