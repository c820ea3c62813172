"""Pure: how a recipe's parallelism is said to DeepSpeed and to PyTorch's FSDP2. Derived, never hand-written.

`workers.deepspeed` is laid over it by DeepSpeed's own names. What follows from the rest of the recipe (batch sizes,
accumulation, clipping, the ZeRO stage, precision, the optimizer) cannot be set there: the two would drift apart.
"""

from __future__ import annotations

import copy
import difflib
import os
from typing import Any

from tercet.config import Config
from tercet.memory import BUCKET_ELEMENTS
from tercet.sections import Parallelism

ZERO_STAGES: dict[Parallelism, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}

# Of the recipe alone. A dotted name also covers what lies below it.
DERIVED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.global_batch_size and workers.num_workers",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "zero_optimization.stage": "workers.parallelism",
    "zero_optimization.offload_optimizer.device": "workers.parallelism",
    "zero_optimization.offload_param.device": "workers.parallelism",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast.enabled": "training.precision",
    "torch_autocast.dtype": "training.precision",
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.lr_scheduler",
    "zero_allow_untested_optimizer": "tercet's own optimizer",
    "zero_force_ds_cpu_optimizer": "tercet's own optimizer",
}

# Sections of DeepSpeed 0.19 whose names stand in other files than its constants.py.
_OTHER_SECTIONS = {
    *("zero_optimization", "steps_per_print", "comms_logger", "flops_profiler", "activation_checkpointing", "aio"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "checkpoint", "data_types", "compile", "timers"),
}

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def is_zero(parallelism: Parallelism) -> bool:
    """DeepSpeed runs it."""
    return parallelism in ZERO_STAGES


def shards_weights(parallelism: Parallelism) -> bool:
    """No rank holds the whole model: a forward pass is a collective of all ranks."""
    return parallelism in ("zero3", "zero3_offload", "fsdp2")


def deepspeed_settings(config: Config, parallelism: Parallelism, rows_per_rank_and_micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's configuration. There is no `optimizer` in it: DeepSpeed's own would leave out the parameters of the
    loss, and is compiled on first use on every node. torch's fused AdamW steps on a CPU as well."""
    training, workers = config.training, config.workers
    on_gpu = workers.use_gpu is True
    zero: dict[str, Any] = {
        "stage": ZERO_STAGES[parallelism],
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET_ELEMENTS,  # allocated whole: DeepSpeed's default would take 1.9 GiB
    }
    if parallelism in ("zero3", "zero3_offload"):
        # By default DeepSpeed 0.19 releases no gathered weight of a model below about 500 million parameters.
        zero["stage3_max_live_parameters"] = BUCKET_ELEMENTS
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
    if parallelism == "zero3_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": rows_per_rank_and_micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if training.precision in _AUTOCAST:
        # fp32 weights and autocast, as in the other modes; DeepSpeed's `bf16` would train and save bf16 weights.
        settings["torch_autocast"] = {"enabled": True, "dtype": _AUTOCAST[training.precision]}
    return _laid_over(settings, workers.deepspeed)


def fsdp_settings(config: Config) -> dict[str, Any]:
    """transformers' `fsdp_config`. The state goes to storage by tercet's own hand, in one format for all modes."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": config.training.gradient_checkpointing,
    }


def environment(parallelism: Parallelism, use_cpu: bool) -> dict[str, str]:
    """Variables that DeepSpeed reads when it is imported."""
    if not is_zero(parallelism):
        return {}
    return {"DS_ACCELERATOR": "cpu" if use_cpu else "cuda", "DS_IGNORE_CUDA_DETECTION": "1"}


def override_problems(overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with `workers.deepspeed`: pairs of problem and hint. Imports DeepSpeed for its own list of names,
    and only when there is something to check."""
    if not overrides:
        return []
    problems = [
        (
            f"workers.deepspeed: `{name}` follows from {source} and cannot be set here",
            f"change {source} instead",
        )
        for name, source in DERIVED.items()
        if _has(overrides, name)
    ]
    if not isinstance(overrides.get("zero_optimization", {}), dict):
        problems.append(("workers.deepspeed: `zero_optimization` is a section", "write its settings below it"))
    for prefix, known in _known_names(overrides).items():
        given = overrides if not prefix else overrides[prefix]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                dotted = f"{prefix}.{name}" if prefix else name
                guess = f"did you mean `{close[0]}`?" if close else "see DeepSpeed's list of settings"
                problems.append((f"workers.deepspeed: DeepSpeed knows no `{dotted}`", guess))
    return problems


def _known_names(overrides: dict[str, Any]) -> dict[str, set[str]]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    top = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    known = {"": top | {name.split(".")[0] for name in DERIVED} | _OTHER_SECTIONS}
    if isinstance(overrides.get("zero_optimization"), dict):
        fields = DeepSpeedZeroConfig.model_fields
        known["zero_optimization"] = {*fields, *(field.alias for field in fields.values() if field.alias)}
    return known


def _has(settings: dict[str, Any], dotted: str) -> bool:
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _laid_over(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(settings)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
