"""Weights that are cast a layer at a time give the same bits as those that autocast casts one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.tiny_families import tiny_encoder
from support.tiny_model import all_texts
from tercet.config.sections import LoraConfig
from tercet.model.lora import add_adapter
from tercet.model.packed_model import prepare
from tercet.model.weight_casts import cast_by_layer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folders: dict[str, Path] = {}

    def make(family: str = "bert") -> SentenceTransformer:
        if family not in folders:
            folders[family] = tiny_encoder(tmp_path_factory.mktemp("family"), family, all_texts(), dropout=0.1)
        return SentenceTransformer(str(folders[family]), device="cpu").train()

    return make


def gradients(model: SentenceTransformer, dtype: torch.dtype | None = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Return the gradients of one packed step and its embeddings."""
    forward = prepare(model, "packed")
    features = [model.preprocess(all_texts()[:8]), model.preprocess(all_texts()[8:16])]
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        embeddings = torch.cat(forward.embed(model, features))
    embeddings.float().pow(3).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**named, "embeddings": embeddings.detach()}


def assert_same_bits(model: SentenceTransformer, dtype: torch.dtype | None = torch.bfloat16) -> None:
    other = copy.deepcopy(model)
    cast_by_layer(other)
    found, expected = gradients(other, dtype), gradients(model, dtype)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value), name
    assert all(not module.copies for module in other.modules() if hasattr(module, "copies"))
    assert {*other.state_dict()} == {*model.state_dict()}


@pytest.mark.parametrize("family", ["bert", "modernbert", "mpnet", "distilbert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_the_same_bits(load: Any, family: str, dtype: torch.dtype | None) -> None:
    assert_same_bits(load(family), dtype)


def test_with_gradient_checkpointing(load: Any) -> None:
    model = load()
    model[0].model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same_bits(model)


def test_with_frozen_weights_and_an_adapter(load: Any) -> None:
    model = load()
    add_adapter(model, LoraConfig(rank=4, target_modules=("query", "value")))
    assert_same_bits(model)


def test_a_weight_that_is_not_used_has_no_gradient(load: Any) -> None:
    model = load()
    for layer in model[0].model.encoder.layer:
        layer.unused = torch.nn.Linear(4, 4)
    assert_same_bits(model)


def test_an_error_leaves_no_copies(load: Any) -> None:
    model = load()
    cast_by_layer(model)
    layer = model[0].model.encoder.layer[0]
    layer.output.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients(model)
    assert layer.output.dense.copies == {}


def test_gradients_arrive_a_layer_at_a_time(load: Any) -> None:
    """So that other ranks' can be added while the backward pass runs."""
    model = load()
    cast_by_layer(model)
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, of=name: arrived.append(of))
    gradients(model)
    layers = [name.split("layer.")[1][0] for name in arrived if "layer." in name and ".dense." in name]
    assert layers == sorted(layers, reverse=True)


def test_a_copy_of_the_model_casts_its_own_weights(load: Any) -> None:
    model = load()
    expected = gradients(copy.deepcopy(model))
    cast_by_layer(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = gradients(copied)
    assert all(found[name].equal(value) for name, value in expected.items())
