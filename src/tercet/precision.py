"""`training.precision: auto`, settled by a measurement: bf16 where the hardware is faster with it, else fp32.

Once for a run: the rank that is first writes its answer to storage, and all ranks and all later attempts take it, so
that a run keeps its precision whatever machines it goes on with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tercet.errors import AlreadyExists
from tercet.plan import TrainPlan
from tercet.sealed import seal, unseal
from tercet.storage import Storage

logger = logging.getLogger("tercet")

# A feed-forward layer of BERT-base on the tokens of a small batch.
NUM_TOKENS, HIDDEN_SIZE, INNER_SIZE = 1024, 768, 3072
SECONDS = 1.0
# Below this, a difference may be noise, and fp32 is the more exact.
MIN_SPEED_UP = 1.2


class Precision(BaseModel):
    """What was chosen, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "bf16"]
    speed_up: float
    """Time in fp32 ÷ time in bf16."""
    device: str


def settled(plan: TrainPlan, storage: Storage, on_cpu: bool) -> TrainPlan:
    """The plan with its precision named. Raises CorruptObject where what was chosen before is damaged."""
    if plan.config.training.precision != "auto":
        return plan
    key = f"runs/{plan.run_id}/precision.json"
    if not storage.exists(key):
        device = "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        with contextlib.suppress(AlreadyExists):
            storage.put_if_absent(key, seal(choose(device, speed_up_of_bf16(device))))
    found = unseal(Precision, storage.read(key), storage.uri_of(key), hint="choose a new --run-id")
    if os.environ.get("RANK", "0") == "0":
        why = f"bf16 is {found.speed_up:.1f} times as fast as fp32 on {found.device}"
        logger.info("precision: %s (%s)", found.precision, why)
    training = plan.config.training.model_copy(update={"precision": found.precision})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"training": training})})


def choose(device: str, speed_up: float) -> Precision:
    """What a speed-up leads to."""
    return Precision(precision="bf16" if speed_up >= MIN_SPEED_UP else "fp32", speed_up=speed_up, device=device)


def speed_up_of_bf16(device: str) -> float:
    """How many times as fast a feed-forward layer is in bf16 autocast as in fp32, forward and backward: the median of
    neighbours, in about a second. 0 where a GPU has no bf16."""
    import torch

    if device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    # Not from the generators of the training: they go on as if nothing had been drawn.
    draw = torch.Generator().manual_seed(0)
    shapes = ((INNER_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, INNER_SIZE), (NUM_TOKENS, HIDDEN_SIZE))
    up, down, tokens = (torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes)
    kind = torch.device(device).type

    def seconds(in_bf16: bool) -> float:
        started = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16, enabled=in_bf16):
            output = torch.nn.functional.linear(torch.nn.functional.linear(tokens, up).relu(), down)
        torch.autograd.grad(output.float().sum(), (up, down, tokens))
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    for in_bf16 in (False, True):
        seconds(in_bf16)  # the first call loads and chooses kernels
    ratios: list[float] = []
    end = time.monotonic() + SECONDS
    while not ratios or time.monotonic() < end:
        ratios.append(seconds(False) / seconds(True))
    return statistics.median(ratios)
