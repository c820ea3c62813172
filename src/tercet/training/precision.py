"""The precision of a run: named by the recipe, measured (`auto`), or the default of the device that it begins on."""

from __future__ import annotations

import functools
import logging
import os
import statistics
import time
from collections.abc import Mapping

from tercet.artifacts.lease import read_attempts
from tercet.artifacts.precision import Precision, check_same_precision, read_precision
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.training.choices import choose_once

logger = logging.getLogger("tercet")

# The trial: tokens, width and inner width of a feed-forward layer. On a CPU that of BERT-base and a small batch; on a
# GPU so much (0.8 TFLOP) that even an H100 computes for over a millisecond, and starting the kernels takes a tenth.
CPU_TRIAL, GPU_TRIAL = (1024, 768, 3072), (16_384, 1024, 4096)
SECONDS = 1.0

# A smaller speed-up may be noise, and the slower precision is more exact.
MIN_SPEED_UP = 1.2


def resolve_precision(plan: TrainPlan, storage: Storage, on_cpu: bool) -> TrainPlan:
    """Return the plan with its precision named: for `auto`, or where the recipe names none, the one that the run began
    with.

    Raises PlanError where this machine cannot compute in it, or the recipe names another, and CorruptObject where the
    stored choice is damaged."""
    named = plan.config.training.precision
    if named not in (None, "auto"):
        check_same_precision(storage, plan.run_id, named)
        return plan
    device = "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    choice = _unset(plan.run_id, storage, device) if named is None else _measured(plan.run_id, storage, device)
    if os.environ.get("RANK", "0") == "0":
        logger.info("precision: %s (%s)", choice.precision, choice.reason)
    training = plan.config.training.model_copy(update={"precision": choice.precision})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"training": training})})


def _unset(run_id: str, storage: Storage, device: str) -> Precision:
    """Return what a run computes in whose recipe names no precision. fp32 on a CPU is not stored."""
    if device == "cpu" and read_precision(storage, run_id) is None:
        return Precision(precision="fp32", device=device)

    def make() -> Precision:
        from tercet.model.precision import default_precision

        # An attempt without a stored choice computed in fp32: on a CPU, or by a tercet that knew no other default.
        return Precision(
            precision="fp32" if read_attempts(storage, run_id) else default_precision(device), device=device
        )

    obstacle = functools.partial(_obstacle, device)
    return choose_once(storage, layout.precision_key(run_id), Precision, make, obstacle)


def _measured(run_id: str, storage: Storage, device: str) -> Precision:
    return choose_once(
        storage,
        layout.precision_key(run_id),
        Precision,
        make=lambda: _measure(device),
        obstacle=functools.partial(_obstacle, device),
    )


def _measure(device: str) -> Precision:
    import torch

    choice = choose(device, speed_ups(device))
    if device != "cpu":  # the memory of the trial is not the training's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return choice


def choose(device: str, speed_ups: Mapping[str, float]) -> Precision:
    """Choose the least exact precision that is at least MIN_SPEED_UP times as fast as every more exact one.

    speed_ups: time in fp32 ÷ time in each other precision of the device, by name."""
    chosen = Precision(precision="fp32", speed_up=max(speed_ups.values(), default=0.0), device=device)
    to_beat = 1.0
    if (tf32 := speed_ups.get("tf32", 0.0)) >= MIN_SPEED_UP * to_beat:
        chosen, to_beat = Precision(precision="tf32", speed_up=tf32, device=device), tf32
    if (bf16 := speed_ups.get("bf16", 0.0)) >= MIN_SPEED_UP * to_beat:
        chosen = Precision(precision="bf16", speed_up=bf16, device=device)
    return chosen


def _obstacle(device: str, choice: Precision) -> str | None:
    import torch

    from tercet.model.precision import has_tf32

    if choice.precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported():
        return "it trains in bf16, which the GPU here does not support"
    if choice.precision == "tf32" and not has_tf32(device):
        return f"it trains in tf32, which {'a CPU' if device == 'cpu' else 'the GPU here'} does not support"
    return None


def speed_ups(device: str) -> dict[str, float]:
    """Return how many times as fast as in fp32 a feed-forward layer is in each other precision that the device has.

    Forward and backward. Each is the median of the ratios of neighbouring trials; all take about SECONDS."""
    import torch

    from tercet.model.precision import has_bf16, has_tf32, products_in

    others = [name for name, has in (("tf32", has_tf32), ("bf16", has_bf16)) if has(device)]
    if not others:
        return {}
    # A generator of its own: the training's random numbers stay the same.
    draw = torch.Generator().manual_seed(0)
    num_tokens, width, inner = CPU_TRIAL if device == "cpu" else GPU_TRIAL
    kind = torch.device(device).type
    shapes = ((inner, width), (width, inner), (num_tokens, width))
    up, down, tokens = (torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes)

    def seconds(precision: str) -> float:
        started = time.perf_counter()
        with products_in(precision), torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
            output = torch.nn.functional.linear(torch.nn.functional.linear(tokens, up).relu(), down)
        with products_in(precision):
            torch.autograd.grad(output.float().sum(), (up, down, tokens))
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for name in ("fp32", *others):
        seconds(name)  # the first call loads and chooses kernels
    ratios: dict[str, list[float]] = {name: [] for name in others}
    end = time.monotonic() + SECONDS
    while not ratios[others[-1]] or time.monotonic() < end:
        for name in others:
            ratios[name].append(seconds("fp32") / seconds(name))
    return {name: statistics.median(values) for name, values in ratios.items()}
