"""The settings of DeepSpeed and FSDP2 for each mode, and which of them a recipe may override."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from support import builders
from tercet.config.sections import Parallelism
from tercet.errors import PlanError
from tercet.planning.engine_settings import (
    DERIVED,
    FREE,
    OF_FILES,
    deepspeed_settings,
    environment,
    fsdp_settings,
    override_problems,
)
from tercet.planning.estimates import BUCKET_ELEMENTS
from tercet.planning.parallelism import ZERO_STAGES, is_zero

TRAINING = {"global_batch_size": 24, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5}


def settings(mode: Parallelism, training: dict[str, Any] | None = None, **workers: Any) -> dict[str, Any]:
    """Settings for two workers, each with 4 rows in a micro-batch."""
    config = builders.config(training={**TRAINING, **(training or {})}, workers={"num_workers": 2, **workers})
    return deepspeed_settings(config, mode, 4)


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


STAGE3 = {
    "stage3_max_live_parameters": BUCKET_ELEMENTS,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(("mode", "stage"), ZERO_STAGES.items())
def test_zero_settings_of_each_mode(mode: Parallelism, stage: int, on_gpu: bool) -> None:
    offload = {"device": "cpu", "pin_memory": on_gpu}
    assert settings(mode, use_gpu=on_gpu)["zero_optimization"] == {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        **(STAGE3 if stage == 3 else {}),
        **({"offload_optimizer": offload, "offload_param": offload} if mode == "zero3_offload" else {}),
    }


def test_the_batches_multiply_to_the_global_one() -> None:
    derived = settings("zero2")
    rows = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 2
    assert rows == derived["train_batch_size"] == TRAINING["global_batch_size"]
    assert derived["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("precision", "autocast"),
    [
        ("fp32", None),
        ("tf32", None),
        ("bf16", {"enabled": True, "dtype": "bfloat16"}),
    ],
)
def test_16_bits_are_autocast_over_fp32_weights(precision: str, autocast: dict[str, Any] | None) -> None:
    derived = settings("zero3", {"precision": precision})
    assert derived.get("torch_autocast") == autocast
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & derived.keys()


@pytest.mark.parametrize("mode", ZERO_STAGES)
def test_fp16_gets_no_settings(mode: Parallelism) -> None:
    """A stored plan reaches the worker without the checks of a recipe."""
    with pytest.raises(PlanError, match=f"fp16 cannot be used with workers.parallelism={mode}: DeepSpeed"):
        settings(mode, {"precision": "fp16"})


@pytest.mark.parametrize("value", ["fp16", "FP16", "float16", "half", "torch.float16"])
@pytest.mark.parametrize("name", ["communication_data_type", "data_types.grad_accum_dtype", "data_types.buffer_dtype"])
def test_fp16_by_other_names(name: str, value: str) -> None:
    [(problem, hint)] = override_problems(nested(name, value))
    assert problem.startswith(f"workers.deepspeed: `{name}`={value} cannot be used")
    assert hint == "choose bf16 or fp32"
    assert override_problems(nested(name, "bf16")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("aio", {"block_size": 1}),
        ("zero_optimization.offload_optimizer.nvme_path", "/mnt"),
        ("zero_optimization.offload_param.nvme_path", "/mnt"),
    ],
)
def test_offloading_to_files(name: str, value: Any) -> None:
    [(problem, hint)] = override_problems(nested(name, value))
    assert f"`{name}` is for offloading to files" in problem
    assert hint == "remove it"


def test_overrides_change_only_what_they_name() -> None:
    plain = dict(leaves(settings("zero3_offload", {"precision": "bf16"})))
    overrides = {
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_bucket_size": 7, "offload_param": {"buffer_count": 3}},
        "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]},
    }
    laid_over = dict(leaves(settings("zero3_offload", {"precision": "bf16"}, deepspeed=overrides)))
    assert laid_over == {**plain, **dict(leaves(overrides))}
    assert not override_problems(overrides)


def test_overrides_leave_the_recipe_alone() -> None:
    overrides: dict[str, Any] = {"zero_optimization": {"reduce_bucket_size": 7}}
    settings("zero2", deepspeed=overrides)["zero_optimization"]["stage"] = 0
    assert overrides == {"zero_optimization": {"reduce_bucket_size": 7}}


def nested(dotted: str, value: Any) -> dict[str, Any]:
    first, _, rest = dotted.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("name", DERIVED)
def test_settings_that_follow_from_the_recipe_cannot_be_set(name: str) -> None:
    [(problem, hint)] = override_problems(nested(name, "cpu"))
    assert problem == f"workers.deepspeed: `{name}` follows from {DERIVED[name]} and cannot be set here"
    assert hint == ("remove it" if "tercet" in DERIVED[name] else f"change {DERIVED[name]} instead")


@pytest.mark.parametrize(
    ("section", "covered"),
    [("zero_optimization", 5), ("torch_autocast", 2), ("data_types", 1)],
)
@pytest.mark.parametrize("value", [None, True, [1]])
def test_a_section_cannot_be_replaced_by_a_value(section: str, covered: int, value: Any) -> None:
    """`torch_autocast: null` would switch off what training.precision asks for."""
    problems = [problem for problem, _ in override_problems({section: value})]
    assert len(problems) == covered
    assert all(f"`{section}." in problem for problem in problems)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offloading_cannot_be_switched_off(name: str) -> None:
    assert "workers.parallelism" in override_problems({"zero_optimization": {name: None}})[0][0]


@pytest.mark.parametrize(
    ("overrides", "name", "hint"),
    [
        ({"steps_per_prnt": 1}, "steps_per_prnt", "did you mean `steps_per_print`?"),
        ({"qqqq": 1}, "qqqq", "see DeepSpeed's list of settings"),
        ({"enabled": True}, "enabled", "see DeepSpeed's list"),  # of a subsection
        ({"max_grad_norm": 1.0}, "max_grad_norm", ""),  # of DeepSpeed's optimizer
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", ""),
        (
            {"zero_optimization": {"reduce_buckt_size": 1}},
            "zero_optimization.reduce_buckt_size",
            "did you mean `zero_optimization.reduce_bucket_size`?",
        ),
        ({"zero_optimization": {"mics_shard_size": 1}}, "zero_optimization.mics_shard_size", ""),
    ],
)
def test_unknown_names(overrides: dict[str, Any], name: str, hint: str) -> None:
    [(problem, advice)] = override_problems(overrides)
    assert problem.startswith(f"workers.deepspeed: `{name}` is unknown")
    assert advice.startswith(hint)


@pytest.mark.parametrize(
    ("zero", "name"),
    [
        ({"reduce_bucket_size": "large"}, "reduce_bucket_size"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size"),
        ({"offload_param": {"nope": 1}}, "offload_param.nope"),
    ],
)
def test_values_that_deepspeed_refuses(zero: dict[str, Any], name: str) -> None:
    [(problem, _)] = override_problems({"zero_optimization": zero})
    assert f"DeepSpeed refuses `zero_optimization.{name}`=" in problem


def test_every_problem_is_reported() -> None:
    overrides = {"optimizer": {}, "nope": 1, "zero_optimization": {"stage": 2, "nope": 1, "reduce_bucket_size": "x"}}
    assert len(override_problems(overrides)) == 5


@pytest.mark.parametrize("mode", ZERO_STAGES)
def test_derived_settings_have_known_names(mode: Parallelism) -> None:
    derived = settings(mode, {"precision": "bf16"}, use_gpu=True)
    # All names are known: only those that follow from the recipe are refused.
    assert all("follows from" in problem for problem, _ in override_problems(derived))


# Settings that would replace tercet's modes, or that DeepSpeed has removed and now refuses or ignores.
OF_NO_USE = {
    *("amp", "autotuning", "compression_training", "curriculum_learning", "data_efficiency", "dataloader_drop_last"),
    *("datastates_ckpt", "disable_allgather", "eigenvalue", "elasticity", "expert_parallel", "graph_harvesting"),
    *("hybrid_engine", "nebula", "pipeline", "progressive_layer_drop", "quantize_training", "sparse_attention"),
    *("seq_parallel_communication_data_type", "sparse_gradients", "tensor_parallel", "vocabulary_size"),
    *("use_data_before_expert_parallelism", "weight_quantization"),
}

# Runs in a process of its own, because DeepSpeed logs, and remembers its device. Prints the settings as DeepSpeed read
# them, and the names that it asked for.
ASK_DEEPSPEED = """
import json, sys
import deepspeed

asked = set()

class Asked(dict):
    def get(self, name, *default):
        asked.add(name)
        return super().get(name, *default)
    def __getitem__(self, name):
        asked.add(name)
        return super().__getitem__(name)
    def __contains__(self, name):
        asked.add(name)
        return super().__contains__(name)
    def keys(self):
        return self

read = []
for settings in json.loads(sys.argv[1]):
    c = deepspeed.DeepSpeedConfig(Asked(settings))
    read.append([c.zero_config.stage, str(c.zero_config.offload_optimizer and c.zero_config.offload_optimizer.device),
                 c.zero_config.reduce_bucket_size, c.torch_autocast_enabled, str(c.torch_autocast_dtype),
                 c.gradient_clipping, c.zero_allow_untested_optimizer, c.optimizer_name])
print("RESULT" + json.dumps([read, sorted(asked)]))
"""


def test_deepspeed_reads_the_settings_as_intended() -> None:
    modes: list[Parallelism] = list(ZERO_STAGES)
    one_worker = {"global_batch_size": 12}  # 4 rows, 3 accumulation steps: DeepSpeed checks the product
    given = [settings(mode, {**one_worker, "precision": "bf16"}, num_workers=1) for mode in modes]
    given.append(settings("zero2", one_worker, num_workers=1))
    done = subprocess.run(
        [sys.executable, "-c", ASK_DEEPSPEED, json.dumps(given)],
        env={**os.environ, **environment("zero1", use_cpu=True)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, asked = json.loads(done.stdout.split("RESULT")[1])
    device = {"zero3_offload": "cpu"}
    bf16 = [True, "torch.bfloat16", 0.5, True, None]
    assert read[:-1] == [[ZERO_STAGES[mode], device.get(mode, "None"), BUCKET_ELEMENTS, *bf16] for mode in modes]
    assert read[-1][3] is False
    # The list of names is complete: it is the one that DeepSpeed itself asks for.
    of_tercet = FREE | {name for name in (*DERIVED, *OF_FILES) if "." not in name}
    assert set(asked) - OF_NO_USE == of_tercet


def test_fsdp_settings() -> None:
    derived = fsdp_settings()
    assert derived["version"] == 2
    assert derived["reshard_after_forward"] is True
    assert "activation_checkpointing" not in derived  # accelerate's own does not keep the random numbers of dropout


@pytest.mark.parametrize("use_cpu", [True, False])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", *ZERO_STAGES])
def test_environment(mode: Parallelism, use_cpu: bool) -> None:
    variables = environment(mode, use_cpu)
    assert is_zero(mode) == bool(variables)
    assert variables.get("DS_ACCELERATOR") in ({"cpu" if use_cpu else "cuda"} if variables else {None})
