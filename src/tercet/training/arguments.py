"""The plan as arguments of transformers' Trainer, and the choice of precision."""

from __future__ import annotations

import functools
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any, Literal

from tercet.config.sections import role_of
from tercet.errors import PlanError
from tercet.planning.engine_settings import deepspeed_settings, fsdp_settings
from tercet.planning.parallelism import is_zero
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.storage.documents import Document
from tercet.training.choices import choose_once


def use_cpu(plan: TrainPlan) -> bool:
    """Return whether this process trains on the CPU."""
    from tercet.model.devices import own_device

    return own_device(plan.config.workers) == "cpu"


def gathers(plan: TrainPlan) -> bool:
    """Return whether weights must be gathered to be saved: they are sharded, or have an adapter to merge.

    True for ZeRO-1 and 2 as well: they put all weights into one flat tensor, which safetensors refuses to write as
    parts."""
    return plan.parallelism != "ddp" or plan.config.model.lora is not None


def column_prompts(columns: tuple[str, ...], prompts: dict[str, str | None]) -> dict[str, str] | None:
    """Return the prompt of each column that has one: the model's own prompts for queries and documents.

    prompts: by role, as the model has them. None if no column has a prompt."""
    by_column = {column: prompts.get(role_of(column)) or "" for column in columns}
    return {column: prompt for column, prompt in by_column.items() if prompt} or None


def training_arguments(plan: TrainPlan, output_dir: Path) -> dict[str, Any]:
    """Return the keyword arguments of transformers' TrainingArguments for a plan.

    Raises PlanError for a precision that needs a GPU if this process has none."""
    training, on_cpu = plan.config.training, use_cpu(plan)
    if on_cpu and training.precision in ("tf32", "fp16"):
        raise PlanError(
            f"training.precision={training.precision} needs a GPU, and this machine has none", "choose fp32 or bf16"
        )
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": plan.rows_per_rank_and_micro_batch,
        "per_device_eval_batch_size": plan.rows_per_rank_and_micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": training.num_epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "use_cpu": on_cpu,
        # accelerate expects a process group wherever a backend is named; a single process has none.
        "ddp_backend": None if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "gloo" if on_cpu else "nccl",
        # The unused pooler is frozen. A model's own code may have more unused parameters; the search costs time.
        "ddp_find_unused_parameters": plan.config.model.trust_remote_code,
        "dataloader_pin_memory": not on_cpu,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "steps",
        "logging_steps": training.log_every_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide them from NonFiniteGuard
        "report_to": "none",
        "disable_tqdm": True,
    }
    if training.precision == "tf32":
        arguments["tf32"] = True
    if is_zero(plan.parallelism):  # autocast is among DeepSpeed's settings
        arguments["deepspeed"] = deepspeed_settings(plan.config, plan.parallelism, plan.rows_per_rank_and_micro_batch)
    elif training.precision in ("bf16", "fp16"):
        arguments[training.precision] = True
    if plan.parallelism == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": fsdp_settings()}
    if training.gradient_checkpointing:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


logger = logging.getLogger("tercet")

# The trial: a feed-forward layer of BERT-base on the tokens of a small batch, for this long.
NUM_TOKENS, HIDDEN_SIZE, INNER_SIZE = 1024, 768, 3072
SECONDS = 1.0

# A smaller speed-up may be noise, and fp32 is more exact.
MIN_SPEED_UP = 1.2


class Precision(Document):
    """The precision that a run chose when it began, and why."""

    precision: Literal["fp32", "bf16"]
    speed_up: float
    """Time in fp32 ÷ time in bf16."""
    device: str


def resolve_precision(plan: TrainPlan, storage: Storage, on_cpu: bool) -> TrainPlan:
    """Return the plan with its precision named: for `auto`, the one that the run chose when it began.

    Raises PlanError where this machine cannot compute in it, CorruptObject where the stored choice is damaged."""
    if plan.config.training.precision != "auto":
        return plan
    device = "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    choice = choose_once(
        storage,
        layout.precision_key(plan.run_id),
        Precision,
        make=lambda: choose(device, speed_up_of_bf16(device)),
        obstacle=functools.partial(_precision_obstacle, device),
    )
    if os.environ.get("RANK", "0") == "0":
        why = f"bf16 is {choice.speed_up:.1f} times as fast as fp32 on {choice.device}"
        logger.info("precision: %s (%s)", choice.precision, why)
    training = plan.config.training.model_copy(update={"precision": choice.precision})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"training": training})})


def choose(device: str, speed_up: float) -> Precision:
    """Choose bf16 if it is at least MIN_SPEED_UP times as fast as fp32."""
    return Precision(precision="bf16" if speed_up >= MIN_SPEED_UP else "fp32", speed_up=speed_up, device=device)


def _precision_obstacle(device: str, choice: Precision) -> str | None:
    import torch

    if choice.precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported():
        return "it trains in bf16, which the GPU here does not support"
    return None


def speed_up_of_bf16(device: str) -> float:
    """Return how many times as fast a feed-forward layer is in bf16 autocast as in fp32, forward and backward.

    It is the median of the ratios of neighbouring trials, and takes about SECONDS. 0 for a GPU without bf16."""
    import torch

    if device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return 0.0
    # A generator of its own: the training's random numbers stay the same.
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
