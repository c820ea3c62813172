"""transformers accepts the arguments made from a plan, and understands by them what the plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from support import builders
from tercet.config.sections import Parallelism
from tercet.errors import PlanError
from tercet.planning.engine_settings import deepspeed_settings
from tercet.planning.parallelism import ZERO_STAGES, is_zero
from tercet.planning.plan import TrainPlan
from tercet.training.arguments import gathers, training_arguments, use_cpu, with_device

MODES: tuple[Parallelism, ...] = get_args(Parallelism)


def plan(mode: Parallelism, precision: str = "fp32", checkpointing: bool = False, **training: Any) -> TrainPlan:
    """A plan of 2 workers with 5 rows each per step."""
    training = {"precision": precision, "gradient_checkpointing": checkpointing, **training}
    return builders.plan(training=training, workers={"num_workers": 2, "use_gpu": False, "parallelism": mode})


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_is_requested_once(mode: Parallelism) -> None:
    """accelerate supports it too with FSDP2; requested from both, activations would be computed three times."""
    found = training_arguments(plan(mode, checkpointing=True), Path("out"))
    assert found["gradient_checkpointing"] is True
    assert "activation_checkpointing" not in found.get("fsdp_config", {})
    assert "gradient_checkpointing" not in training_arguments(plan(mode), Path("out"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_precision_is_requested_once(mode: Parallelism, precision: str) -> None:
    found = training_arguments(plan(mode, precision), Path("out"))
    by_transformers, by_deepspeed = found.get("bf16", False), "torch_autocast" in found.get("deepspeed", {})
    assert by_transformers + by_deepspeed == (precision == "bf16")
    assert by_deepspeed == (precision == "bf16" and is_zero(mode))


@pytest.mark.parametrize("mode", MODES)
def test_which_modes_gather(mode: Parallelism) -> None:
    assert gathers(plan(mode)) == (mode != "ddp")


def test_an_adapter_is_gathered_to_be_merged() -> None:
    assert gathers(builders.plan(model={"lora": {}}))


@pytest.mark.parametrize(
    ("use_gpu", "has_gpu", "wanted"),
    [(False, True, True), (False, False, True), (True, True, False), ("auto", True, False), ("auto", False, True)],
)
def test_the_device(monkeypatch: pytest.MonkeyPatch, use_gpu: bool | str, has_gpu: bool, wanted: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    made_plan = builders.plan(workers={"use_gpu": use_gpu})
    assert use_cpu(made_plan) is wanted
    found = training_arguments(made_plan, Path("out"))
    assert (found["use_cpu"], found["dataloader_pin_memory"]) == (wanted, not wanted)


@pytest.mark.parametrize(
    ("use_gpu", "num_gpus", "num_workers", "wanted"),
    [
        ("auto", 0, 1, False),
        ("auto", 1, 1, True),
        ("auto", 1, 2, False),
        ("auto", 2, 2, True),
        (True, 1, 1, True),
        (False, 8, 1, False),
    ],
)
def test_the_device_is_settled_without_ray(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool | str, num_gpus: int, num_workers: int, wanted: bool
) -> None:
    """DeepSpeed's settings ask whether `use_gpu` is true."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_workers))
    settled = with_device(builders.plan(workers={"use_gpu": use_gpu})).config
    assert settled.workers.use_gpu is wanted
    assert deepspeed_settings(settled, "zero2", 1)["zero_optimization"]["overlap_comm"] is wanted


def test_a_gpu_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=r"workers.use_gpu is true, but torch finds no GPU"):
        with_device(builders.plan(workers={"use_gpu": True}))


@pytest.mark.parametrize(("step_seconds", "seconds"), [(1800, 1860), (7200, 7260), (5, 1800)])
def test_a_hang_is_reported_before_its_collective_ends(step_seconds: int, seconds: int) -> None:
    made_plan = builders.plan(workers={"use_gpu": False, "step_timeout_seconds": step_seconds})
    assert training_arguments(made_plan, Path("out"))["ddp_timeout"] == seconds


@pytest.mark.parametrize(
    ("world_size", "use_gpu", "backend"), [(1, False, None), (2, False, "gloo"), (2, True, "nccl")]
)
def test_the_backend(monkeypatch: pytest.MonkeyPatch, world_size: int, use_gpu: bool, backend: str | None) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_arguments(builders.plan(workers={"use_gpu": use_gpu}), Path("out"))["ddp_backend"] == backend


# Reads plans, and prints the settings that transformers derives from each.
READ = """
import json, sys
from pathlib import Path
from sentence_transformers import SentenceTransformerTrainingArguments
from tercet.planning.plan import TrainPlan
from tercet.training.deepspeed_engine import prepare_process
from tercet.training.arguments import training_arguments, use_cpu

rows = []
for text in json.loads(sys.argv[1]):
    plan = TrainPlan.model_validate_json(text)
    prepare_process(plan.parallelism, use_cpu(plan))
    args = SentenceTransformerTrainingArguments(**training_arguments(plan, Path(sys.argv[2])))
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else {}
    rows.append({
        "world_size": args.world_size, "device": args.device.type, "micro_batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps, "bf16": args.bf16, "learning_rate": args.learning_rate,
        "checkpointing": args.gradient_checkpointing, "warmup_steps": args.warmup_steps,
        "zero": deepspeed.get("zero_optimization", {}).get("stage"),
        "autocast": deepspeed.get("torch_autocast"),
        "of_deepspeed": [deepspeed.get("train_micro_batch_size_per_gpu"), deepspeed.get("train_batch_size"),
                         deepspeed.get("gradient_clipping")],
        "fsdp": args.fsdp_plugin_args and args.fsdp_plugin_args["fsdp_version"],
        "of_accelerate": (args.fsdp_plugin_args or {}).get("activation_checkpointing", False),
    })
if args.process_index == 0:
    print("RESULT" + json.dumps(rows))
"""
COMBINATIONS = [(precision, checkpointing) for precision in ("fp32", "bf16") for checkpointing in (False, True)]


# DeepSpeed changes global state, so the other modes run in another process.
GROUPS: tuple[tuple[Parallelism, ...], ...] = (("ddp", "fsdp2"), tuple(ZERO_STAGES))


def read(modes: tuple[Parallelism, ...], tmp_path: Path) -> list[dict[str, Any]]:
    """Return the settings that transformers derives for each mode and combination, on two ranks."""
    training = {"gradient_accumulation_steps": 5, "max_grad_norm": 0.5, "global_batch_size": 10}
    plans = [plan(mode, *combination, **training) for mode in modes for combination in COMBINATIONS]
    script = tmp_path / "read.py"
    script.write_text(READ)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    texts = json.dumps([one.model_dump_json() for one in plans])
    done = subprocess.run(
        [*launcher, str(script), texts, str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.split("RESULT")[1])
    return rows


@pytest.mark.parametrize("modes", GROUPS)
def test_transformers_derives_what_the_plan_says(tmp_path: Path, modes: tuple[Parallelism, ...]) -> None:
    given = [(mode, *combination) for mode in modes for combination in COMBINATIONS]
    for (mode, precision, checkpointing), row in zip(given, read(modes, tmp_path), strict=True):
        bf16, zero, fsdp2 = precision == "bf16", is_zero(mode), mode == "fsdp2"
        assert row == {
            "world_size": 2,
            "device": "cpu",
            "micro_batch": 1,
            "accumulation": 5,
            "bf16": bf16 and not zero,
            "learning_rate": 2e-5,
            "checkpointing": checkpointing,
            "warmup_steps": builders.plan().warmup_steps,
            "zero": ZERO_STAGES.get(mode),
            "autocast": {"enabled": True, "dtype": "bfloat16"} if zero and bf16 else None,
            "of_deepspeed": [1, 10, 0.5] if zero else [None, None, None],
            "fsdp": 2 if fsdp2 else None,
            "of_accelerate": False,
        }


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_a_precision_that_needs_a_gpu_is_refused_without_one(tmp_path: Path, precision: str) -> None:
    """`use_gpu: auto` is decided after the plan is made."""
    plan = builders.plan(training={"precision": precision}, workers={"use_gpu": "auto"})
    with pytest.raises(PlanError, match=f"training.precision={precision} needs a GPU"):
        training_arguments(plan, tmp_path)
