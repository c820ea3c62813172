"""The plan as arguments of transformers' Trainer."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from tercet.config.sections import role_of
from tercet.errors import PlanError
from tercet.planning.engine_settings import collective_timeout_seconds, deepspeed_settings, fsdp_settings
from tercet.planning.parallelism import is_zero
from tercet.planning.plan import TrainPlan

logger = logging.getLogger("tercet")


def use_cpu(plan: TrainPlan) -> bool:
    """Return whether this process trains on the CPU."""
    from tercet.model.devices import own_device

    return own_device(plan.config.workers) == "cpu"


def with_device(plan: TrainPlan) -> TrainPlan:
    """Return the plan with `use_gpu: auto` decided for this process: GPUs where this machine has one for each of its
    workers. Under Ray the driver has decided.

    Raises PlanError for `use_gpu: true` without any GPU."""
    import torch

    workers, num_gpus = plan.config.workers, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if workers.use_gpu is True and num_gpus == 0:
        raise PlanError(
            "workers.use_gpu is true, but torch finds no GPU on this machine",
            hint="check `nvidia-smi` and that torch was built for CUDA, or set workers.use_gpu to false",
        )
    if workers.use_gpu != "auto":
        return plan
    num_workers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    use_gpu = num_gpus >= num_workers
    if os.environ.get("RANK", "0") == "0":
        text = "the workers use %s: this machine has %d GPUs for %d workers"
        logger.warning(text, "GPUs" if use_gpu else "CPUs", num_gpus, num_workers)
    workers = workers.model_copy(update={"use_gpu": use_gpu})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"workers": workers})})


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
        "gradient_accumulation_steps": training.num_micro_batches,
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
        "ddp_timeout": collective_timeout_seconds(plan.config.workers),
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
