"""Pure: settings of DeepSpeed and of PyTorch's FSDP2 for a plan's parallelism. Derived, never written by hand.

`workers.deepspeed` overrides them by DeepSpeed's own names. Settings that follow from the rest of the recipe (batch
sizes, accumulation, clipping, the ZeRO stage, precision, the optimizer) cannot be overridden: the two would drift
apart.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tercet.config.recipe import Config
from tercet.config.sections import Parallelism, WorkersConfig
from tercet.errors import PlanError
from tercet.planning.estimates import BUCKET_ELEMENTS
from tercet.planning.parallelism import ZERO_STAGES, is_zero

_OWN = "the way tercet trains"

# DeepSpeed's settings that follow from the recipe. A dotted name also covers the settings below it.
DERIVED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.global_batch_size and workers.num_workers",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "zero_optimization.stage": "workers.parallelism",
    "zero_optimization.offload_optimizer.device": "workers.parallelism",
    "zero_optimization.offload_param.device": "workers.parallelism",
    "zero_optimization.cpu_offload": "workers.parallelism",
    "zero_optimization.cpu_offload_param": "workers.parallelism",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast.enabled": "training.precision",
    "torch_autocast.dtype": "training.precision",
    "data_types.param_dtype": "training.precision",
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.lr_scheduler",
    "zero_allow_untested_optimizer": _OWN,
    "zero_force_ds_cpu_optimizer": _OWN,
    "managed_gradient_accumulation": _OWN,
    "gradient_allreduce_op": _OWN,
}

# The other settings that DeepSpeed 0.19 reads at the top level: a recipe may set them.
FREE = {
    *("zero_optimization", "torch_autocast", "data_types", "activation_checkpointing", "compile", "checkpoint"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_python_gc", "log_level"),
    *("steps_per_print", "dump_state", "wall_clock_breakdown", "memory_breakdown", "flops_profiler", "timers"),
    *("comms_logger", "tensorboard", "wandb", "comet", "csv_monitor"),
}

# Settings of DeepSpeed's file offloading, which tercet has no mode for. DeepSpeed would compile it with g++ on every
# node when it is first used.
OF_FILES = ("aio", "zero_optimization.offload_optimizer.nvme_path", "zero_optimization.offload_param.nvme_path")

# Types of what DeepSpeed sends, adds up and holds, beside the weights.
_TYPES = ("communication_data_type", "data_types.grad_accum_dtype", "data_types.buffer_dtype")
_NAMES_OF_FP16 = ("fp16", "float16", "half", "torch.float16", "torch.half")

_FP16_WITHOUT_DDP = {
    # DeepSpeed 0.19.8 scales the loss, but clips by the norm of the scaled gradients, and after a step that overflows
    # it never lowers the scale.
    **dict.fromkeys(ZERO_STAGES, "DeepSpeed would clip scaled gradients, and skip every step after an overflow"),
    "fsdp2": "its sharded gradients would need another gradient scaler than transformers has",
}


def deepspeed_settings(config: Config, parallelism: Parallelism, rows_per_rank_and_micro_batch: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    It has no `optimizer`: DeepSpeed's own would omit the parameters of the loss, and is compiled on first use on every
    node. torch's fused AdamW works on a CPU too. Raises PlanError for fp16."""
    training, workers = config.training, config.workers
    for problem, hint in fp16_problems(training.precision, parallelism):
        raise PlanError(problem, hint=hint)
    on_gpu = workers.use_gpu is True
    zero: dict[str, Any] = {
        "stage": ZERO_STAGES[parallelism],
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET_ELEMENTS,  # allocated as a whole: DeepSpeed's default takes 1.9 GiB
    }
    if parallelism in ("zero3", "zero3_offload"):
        # By default, DeepSpeed 0.19 releases no gathered weights if a model has less than about 500 million parameters.
        zero["stage3_max_live_parameters"] = BUCKET_ELEMENTS
        zero["stage3_max_reuse_distance"] = 0
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
    if parallelism == "zero3_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": rows_per_rank_and_micro_batch,
        "gradient_accumulation_steps": training.num_micro_batches,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if training.precision == "bf16":
        # fp32 weights with autocast, as in the other modes. DeepSpeed's `bf16` would train and save bf16 weights.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return _merged(settings, workers.deepspeed)


def fsdp_settings() -> dict[str, Any]:
    """Return transformers' `fsdp_config`. tercet itself stores the state, in one format for all modes.

    Activation checkpointing is omitted, because transformers does it, as in the other modes. accelerate 1.15 would do
    it without `preserve_rng_state`: dropout would differ between the two forward passes, and gradients would be
    wrong."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
    }


# Ray's and torch's own limit of a collective: the first ones wait for a download by rank 0.
MIN_COLLECTIVE_SECONDS = 1800
# Time to record a hang, before the collective that waits for it ends with an error that explains nothing.
SECONDS_AFTER_A_HANG = 60


def collective_timeout_seconds(workers: WorkersConfig) -> int:
    """Return how long a rank waits for the others in a collective. A step that takes longer than
    `workers.step_timeout_seconds` ends first, with the stacks that explain it."""
    return max(MIN_COLLECTIVE_SECONDS, workers.step_timeout_seconds + SECONDS_AFTER_A_HANG)


# Both names of the settings of torch's GPU allocator; the second is older.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocator_environment(use_gpu: bool | str, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variable of torch's GPU allocator, unless `given` has one or no GPU is used.

    Packed rows differ in length from step to step. Without segments that grow, nearly every step would ask the driver
    for blocks of new sizes, and memory would end up in pieces that fit no step."""
    if use_gpu is False or any(name in given for name in ALLOCATOR_SETTINGS):
        return {}
    return {ALLOCATOR_SETTINGS[0]: "expandable_segments:True"}


def environment(parallelism: Parallelism, use_cpu: bool) -> dict[str, str]:
    """Return environment variables that DeepSpeed reads at import."""
    if not is_zero(parallelism):
        return {}
    return {"DS_ACCELERATOR": "cpu" if use_cpu else "cuda", "DS_IGNORE_CUDA_DETECTION": "1"}


def fp16_problems(precision: str | None, parallelism: str) -> list[tuple[str, str]]:
    """Return the problem of fp16 with any mode but ddp, with a hint; an empty list if there is none.

    Both arguments are values of the recipe, so either may be `auto`."""
    if precision != "fp16" or parallelism not in _FP16_WITHOUT_DDP:
        return []
    return [
        (
            f"training.precision=fp16 cannot be used with workers.parallelism={parallelism}: "
            f"{_FP16_WITHOUT_DDP[parallelism]}",
            "choose training.precision: bf16, or workers.parallelism: ddp",
        )
    ]


def override_problems(overrides: dict[str, Any]) -> list[tuple[str, str]]:
    """Return problems of `workers.deepspeed` as pairs of problem and hint.

    If there are ZeRO settings, this imports DeepSpeed for its own check of them."""
    problems = [
        (
            f"workers.deepspeed: `{name}` follows from {source} and cannot be set here",
            "remove it" if source == _OWN else f"change {source} instead",
        )
        for name, source in DERIVED.items()
        if _has(overrides, name)
    ]
    problems += [
        (f"workers.deepspeed: `{name}` is for offloading to files, which tercet does not do", "remove it")
        for name in OF_FILES
        if _value(overrides, name) is not None
    ]
    problems += [
        (
            f"workers.deepspeed: `{name}`={_value(overrides, name)} cannot be used: without a scaled loss, fp16 loses "
            "small gradients and overflows at large ones",
            "choose bf16 or fp32",
        )
        for name in _TYPES
        if str(_value(overrides, name)).lower() in _NAMES_OF_FP16
    ]
    known = FREE | {name for name in (*DERIVED, *OF_FILES) if "." not in name}
    problems += [_unknown(name, known) for name in overrides if name not in known]
    zero = overrides.get("zero_optimization", {})
    return problems + (_zero_problems(zero) if isinstance(zero, dict) and zero else [])


def _zero_problems(zero: dict[str, Any]) -> list[tuple[str, str]]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    problems = [_unknown(f"zero_optimization.{name}", known) for name in zero if name not in known]
    try:
        DeepSpeedZeroConfig(
            **{name: value for name, value in zero.items() if f"zero_optimization.{name}" not in DERIVED}
        )
    except ValidationError as error:
        for item in error.errors():
            dotted = ".".join(["zero_optimization", *map(str, item["loc"])])
            if item["loc"] and item["loc"][0] in known:  # unknown names are reported above, with a suggestion
                problem = f"workers.deepspeed: DeepSpeed refuses `{dotted}`={item['input']!r}: {item['msg']}"
                problems.append((problem, "see DeepSpeed's list of settings"))
    return problems


def _unknown(dotted: str, known: set[str]) -> tuple[str, str]:
    section, dot, name = dotted.rpartition(".")
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    guess = f"did you mean `{section}{dot}{close[0]}`?" if close else "see DeepSpeed's list of settings"
    return f"workers.deepspeed: `{dotted}` is unknown to DeepSpeed, or has no effect here", guess


def _has(settings: dict[str, Any], dotted: str) -> bool:
    """Return whether a setting is given, or replaced together with its section (`section: null`)."""
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, dict):
            return True
        if part not in value:
            return False
        value = value[part]
    return True


def _value(settings: dict[str, Any], dotted: str) -> Any:
    """Return a setting, or None if it is not given."""
    value: Any = settings
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _merged(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(settings)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
