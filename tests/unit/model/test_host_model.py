"""A model on the host takes all weights of the one that is trained, and is written as that one would be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import tiny_model
from tercet.config.sections import ModelConfig
from tercet.errors import CorruptObject
from tercet.model.encoder import make_model, save
from tercet.model.host_model import HostModel
from tercet.model.packed_model import prepare


class Model(torch.nn.Sequential):
    """Two layers, a buffer, and one tensor under two names."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(torch.nn.Linear(3, 4))
        tiny_model.add_layers(self, seed)


def host_of(model: Any) -> HostModel:
    return HostModel(ModelConfig(name_or_path="unused"), model, is_pinned=False)


def test_gathered_weights_fill_another_model() -> None:
    model, other = Model(0), Model(1)
    host_of(other).take(model, torch.Tensor.copy_)  # type: ignore[arg-type]
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    model.first.weight.data.zero_()
    assert other.first.weight.abs().min() > 0


@pytest.mark.parametrize(
    ("found", "problem"), [(None, "is missing"), ((3, 4), r"is of shape \(3, 4\)"), ((0,), r"is of shape \(0,\)")]
)
def test_missing_weights_and_other_shapes_are_refused(
    tmp_path: Path, found: tuple[int, ...] | None, problem: str
) -> None:
    """When the model is written: a rank that left the gathering early would leave the others waiting."""
    model = Model()
    del model.first.weight
    if found is not None:
        model.first.weight = torch.nn.Parameter(torch.zeros(found))
    host = host_of(Model())
    host.take(model, torch.Tensor.copy_)  # type: ignore[arg-type]
    with pytest.raises(CorruptObject, match=f"first.weight {problem}.*should be of shape"):
        host.write(tmp_path)


@pytest.mark.parametrize("is_gathered", [False, True])
def test_it_is_written_as_the_trained_model_would_be(tmp_path: Path, is_gathered: bool) -> None:
    """After the forward pass is packed, and steps have moved the weights. The random state stays as it was."""
    config = ModelConfig(name_or_path=str(tiny_model.tiny_bert(tmp_path / "base", tiny_model.all_texts())))
    model, state = make_model(config, "cpu"), torch.random.get_rng_state()
    host = HostModel.of(config, model, is_gathered)
    assert torch.equal(torch.random.get_rng_state(), state)
    prepare(model, "packed")
    for parameter in model.parameters():
        parameter.data.add_(0.5)
    host.take(model, torch.Tensor.copy_)  # type: ignore[arg-type]
    save(config, model, tmp_path / "expected")
    for parameter in model.parameters():
        parameter.data.zero_()  # training continues
    host.write(tmp_path / "written")
    hashes = [
        {p.relative_to(tmp_path / name): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
        for name in ("expected", "written")
        if (paths := sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()))
    ]
    assert hashes[0] == hashes[1]


def test_what_the_trainer_changes_in_the_configuration_is_not_written(tmp_path: Path) -> None:
    """A run that resumes from it must compute what it computed before."""
    config = ModelConfig(name_or_path=str(tiny_model.tiny_bert(tmp_path / "base", tiny_model.all_texts())))
    model = make_model(config, "cpu")
    host, before = HostModel.of(config, model, is_gathered=False), model[0].model.config.pad_token_id
    model[0].model.config.pad_token_id = before + 1
    host.take(model, torch.Tensor.copy_)  # type: ignore[arg-type]
    host.write(tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["pad_token_id"] == before
