"""Weights are gathered and copied into a whole model; a wrapped model is what the plan says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, T5EncoderModel
from transformers.integrations import deepspeed

from support import tiny_model
from tercet.config.sections import Parallelism
from tercet.errors import ConfigError, TrainingError
from tercet.model import sharding
from tercet.model.sharding import (
    check_recomputes,
    check_wrapped,
    full_weights,
    layers,
    unit_classes,
    unsharded,
)

MODES: tuple[Parallelism, ...] = ("zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


class Model(torch.nn.Module):
    """Two layers, a buffer, and one tensor under two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        tiny_model.add_layers(self, seed)


def test_all_weights_and_buffers_are_gathered() -> None:
    weights = full_weights(Model())
    assert weights is not None
    assert {"table.weight", "tied.weight", "norm.running_mean"} <= weights.keys()


def test_gathered_weights_are_copies() -> None:
    model = Model()
    weights = full_weights(model)
    assert weights is not None
    weights["first.weight"].zero_()
    assert model.first.weight.abs().min() > 0


def test_only_rank_0_gets_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert full_weights(Model()) is None


# --- how a model is wrapped -----------------------------------------------------------------------------------------


def test_an_unwrapped_model_is_right_for_ddp_on_one_rank() -> None:
    check_wrapped(Model(), "ddp", 1)


def test_one_process_on_several_gpus_is_refused() -> None:
    with pytest.raises(TrainingError, match="several GPUs") as caught:
        check_wrapped(torch.nn.DataParallel(Model()), "ddp", 1)
    assert "torchrun" in caught.value.hint


@pytest.mark.parametrize(("mode", "num_workers"), [("ddp", 2), *((mode, 1) for mode in MODES)])
def test_an_unwrapped_model_is_wrong_for_anything_else(mode: Parallelism, num_workers: int) -> None:
    with pytest.raises(TrainingError, match=f"parallelism {mode} on {num_workers} workers.*runs as a lone model"):
        check_wrapped(Model(), mode, num_workers)


class DeepSpeedEngine(torch.nn.Module):
    """The parts of DeepSpeed's engine that are read: stage, offloading, and parameters cut for two ranks or not."""

    def __init__(self, stage: int, offloads: bool = False, num_local: int = 6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(0))
        self.weight.ds_id, self.weight.ds_numel = 0, 11
        self.weight.ds_tensor = torch.zeros(num_local)
        self.weight.ds_tensor.ds_numel = num_local
        self.stage, self.offloads = stage, offloads

    def zero_optimization_stage(self) -> int:
        return self.stage

    def zero_offload_optimizer(self) -> object:
        return object()

    def zero_cpu_offload(self) -> bool:
        return self.offloads


ENGINES = {
    "zero1": DeepSpeedEngine(1),
    "zero2": DeepSpeedEngine(2),
    "zero3": DeepSpeedEngine(3),
    "zero3_offload": DeepSpeedEngine(3, offloads=True),
}


@pytest.mark.parametrize("wanted", ["ddp", *MODES])
@pytest.mark.parametrize("found", ENGINES)
def test_each_engine_is_recognized_as_its_own_mode_only(found: str, wanted: Parallelism) -> None:
    if found == wanted:
        check_wrapped(ENGINES[found], wanted, 2)
    else:
        with pytest.raises(TrainingError, match=f"runs as {found}"):
            check_wrapped(ENGINES[found], wanted, 2)


def test_weights_that_should_be_sharded_but_are_whole_are_refused() -> None:
    with pytest.raises(TrainingError, match="weight is not sharded by zero3: this rank holds 11 of 11"):
        check_wrapped(DeepSpeedEngine(3, num_local=11), "zero3", 2)


# --- what FSDP2 gathers at a time -----------------------------------------------------------------------------------

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
ENCODERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bert": ({"num_hidden_layers": 2}, ["BertEmbeddings", "BertLayer"]),
    "mpnet": ({"num_hidden_layers": 2}, ["MPNetEmbeddings", "MPNetLayer"]),  # transformers lists none for it
    "distilbert": (
        {"n_layers": 2, "dim": 8, "n_heads": 2, "hidden_dim": 8, "vocab_size": 20},
        ["Embeddings", "TransformerBlock"],
    ),
    "modernbert": ({"num_hidden_layers": 2, "pad_token_id": 0}, ["ModernBertEmbeddings", "ModernBertEncoderLayer"]),
    "qwen3": (
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4},
        ["Embedding", "Qwen3DecoderLayer"],  # the table is beside the layers
    ),
    # Its table is tied to another one, so it stays in the root unit.
    "t5": ({"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 20}, ["T5Block"]),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_units_of_every_kind_of_encoder(kind: str) -> None:
    settings, names = ENCODERS[kind]
    own = {} if kind in ("distilbert", "t5") else SMALL
    config = AutoConfig.for_model(kind, **own, **settings)
    encoder = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    model = torch.nn.Sequential(encoder, torch.nn.Linear(8, 8))
    model.__dict__["transformers_model"] = encoder  # a property in sentence-transformers, not a module
    assert unit_classes(model) == names
    assert len(layers(model)) == 2


def test_nested_layers_stay_in_one_unit() -> None:
    experts = torch.nn.Module()
    experts.mlp = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([experts, torch.nn.Dropout()])
    assert layers(model) == [experts]


def test_a_model_that_fsdp2_would_gather_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its root is wrapped, as accelerate would do by default."""
    monkeypatch.setattr(sharding, "FSDPModule", type("FSDPModule", (), {}))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    model.__class__ = type("Wrapped", (torch.nn.Module, sharding.FSDPModule), {})
    with pytest.raises(TrainingError, match="gather the whole model at once"):
        check_wrapped(model, "fsdp2", 2)


def test_a_model_without_gradient_checkpointing_is_refused() -> None:
    model = Model()
    with pytest.raises(ConfigError, match="nothing in this model supports it"):
        check_recomputes(model)
    model.first.gradient_checkpointing = True
    check_recomputes(model)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("before", [None, "a weak reference"])
def test_unsharded_restores_the_setting(monkeypatch: pytest.MonkeyPatch, before: str | None, raises: bool) -> None:
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", before)
    seen = []
    try:
        with unsharded():
            seen.append(deepspeed._hf_deepspeed_config_weak_ref)
            if raises:
                raise KeyError("in between")
    except KeyError:
        assert raises
    assert seen == [None]
    assert deepspeed._hf_deepspeed_config_weak_ref == before


LONE = """
import sys
import torch.distributed as dist
from sentence_transformers import SentenceTransformerTrainingArguments
from tercet.training.deepspeed_engine import prepare_process
prepare_process(sys.argv[1], use_cpu=True)
backend = dist.get_backend() if dist.is_initialized() else None
args = SentenceTransformerTrainingArguments(output_dir=sys.argv[2], use_cpu=True, report_to="none")
print("RESULT", backend, args.process_index, args.world_size, args.device.type)
"""


@pytest.mark.parametrize(("mode", "backend"), [("zero2", "gloo"), ("ddp", "None"), ("fsdp2", "None")])
def test_a_single_process(tmp_path: Path, mode: str, backend: str) -> None:
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", LONE, mode, str(tmp_path)]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("RESULT")[1].split() == [backend, "0", "1", "cpu"]
