"""Models of type `new`, such as stella, are loaded as transformers has them, and nothing of their own code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import GteModel

from support.tiny_model import HIDDEN, all_texts, tiny_new
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError
from tercet.model.encoder import load_model, make_model
from tercet.model.saved_form import prove_saving
from tercet.planning.model_files import native_config, read_facts

TEXTS = all_texts()[:6]


def load(folder: Path, **values: Any) -> SentenceTransformer:
    return load_model(ModelConfig(name_or_path=str(folder), **values), "cpu")


@pytest.mark.parametrize("prefix", ["", "new."])
def test_every_weight_is_the_one_of_the_file(tmp_path: Path, prefix: str) -> None:
    folder = tiny_new(tmp_path / "model", prefix=prefix)
    encoder = load(folder).transformers_model
    assert isinstance(encoder, GteModel)
    stored = {name.removeprefix(prefix): value for name, value in load_file(folder / "model.safetensors").items()}
    layer, start = encoder.layers[1], "encoder.layer.1"
    attention = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    pairs = [
        (encoder.embeddings.word_embeddings.weight, stored["embeddings.word_embeddings.weight"]),
        (torch.cat([each.weight for each in attention]), stored[f"{start}.attention.qkv_proj.weight"]),
        (torch.cat([each.bias for each in attention]), stored[f"{start}.attention.qkv_proj.bias"]),
        (torch.cat([layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight]), stored[f"{start}.mlp.up_gate_proj.weight"]),
        (layer.post_attention_layernorm.weight, stored[f"{start}.attn_ln.weight"]),
        (layer.post_mlp_layernorm.bias, stored[f"{start}.mlp_ln.bias"]),
    ]
    assert all(torch.equal(*pair) for pair in pairs)
    assert sum(p.numel() for p in encoder.parameters()) == sum(value.numel() for value in stored.values())


@pytest.mark.parametrize(("factor", "is_scaled"), [(2.0, True), (8, True), (1.0, False)])
def test_rotary_positions_have_the_fixed_ntk_scaling(tmp_path: Path, factor: float, is_scaled: bool) -> None:
    scaling = {"type": "ntk", "factor": factor}
    inverse = load(tiny_new(tmp_path / "model", scaling)).transformers_model.rotary_emb.inv_freq
    size = HIDDEN // 2
    base = 160000 * factor if is_scaled else 160000
    wanted = 1.0 / (base ** (torch.arange(0, size, 2).float() / size))
    assert torch.equal(inverse, wanted / factor ** (2 / size) if is_scaled else wanted)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_scaling_is_kept_where_transformers_has_saved_the_model(tmp_path: Path) -> None:
    """transformers 5 writes `rope_parameters` in the place of `rope_scaling`."""
    folder = tiny_new(tmp_path / "model")
    wanted = load(folder).transformers_model.rotary_emb.inv_freq
    parameters = {"type": "ntk", "rope_type": "ntk", "factor": 2.0, "rope_theta": 160000}
    change_config(folder, rope_scaling=None, rope_theta=None, rope_parameters=parameters)
    assert torch.equal(load(folder).transformers_model.rotary_emb.inv_freq, wanted)
    change_config(folder, rope_parameters={**parameters, "rope_type": "yarn", "type": "yarn"})
    with pytest.raises(ConfigError):
        load(folder)


def test_a_saved_model_is_the_same_for_plain_sentence_transformers(tmp_path: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_new(tmp_path / "model")))
    model = make_model(config, "cpu").eval()
    prove_saving(config, model)
    model.save_pretrained(str(tmp_path / "saved"))
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(plain.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-6
    assert not [*(tmp_path / "saved").rglob("*.py")]
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_switches_of_the_fast_path_change_nothing(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    switched = load(folder, config_kwargs={"unpad_inputs": False, "use_memory_efficient_attention": False})
    assert abs(switched.encode(TEXTS) - load(folder).encode(TEXTS)).max() < 1e-6
    assert not hasattr(switched.transformers_model.config, "unpad_inputs")


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    whole = load(folder).encode(TEXTS)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [*folder.iterdir()]:
        if path.is_file() and path.name != "modules.json":
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(modules))
    assert abs(load(folder).encode(TEXTS) - whole).max() < 1e-6


def test_a_plan_counts_what_is_loaded(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    heads = {"lm_head.decoder.weight": torch.zeros(50, 32), "pooler.dense.weight": torch.zeros(32, 32)}
    save_file({**tensors, **heads}, folder / "model.safetensors", metadata={"format": "pt"})
    facts, encoder = read_facts(folder), load(folder).transformers_model
    assert facts is not None
    assert facts.num_parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert facts.num_embedding_parameters == sum(parameter.numel() for parameter in encoder.embeddings.parameters())
    assert (facts.num_layers, facts.hidden_size) == (2, HIDDEN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type is absolute"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type is rms_norm"),
        ({"logn_attention_scale": True}, "logn_attention_scale is True"),
        ({"pack_qkv": False}, "pack_qkv is False"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.65}}, "tercet knows only fixed NTK"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "tercet knows only fixed NTK"),
        ({"rope_scaling": "ntk"}, "tercet knows only fixed NTK"),
        ({"rope_scaling": {"type": "ntk", "factor": -2.0}}, "tercet knows only fixed NTK"),
        ({"rope_theta": "160000"}, "not a positive number"),
        ({"num_hidden_layers": 3}, r"no tensor encoder\.layer\.2\.attention\.qkv_proj\.weight"),
    ],
)
def test_what_transformers_does_not_have_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = tiny_new(tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ConfigError, match="contains custom code") as caught:
        load(folder)
    assert "model.trust_remote_code: true" in caught.value.hint
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(caught.value.hint)


def test_rotary_positions_cannot_be_changed_by_the_recipe(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        load(folder, config_kwargs={"rope_scaling": {"type": "ntk", "factor": 8.0}})
    assert "model.config_kwargs changes rope_scaling" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 500}, "do not have the shapes"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "none such"}, "KeyError"),
        ({"pad_token_id": 9999}, "AssertionError"),
        ({"type_vocab_size": None}, "StrictDataclass"),
    ],
)
def test_a_wrong_value_is_an_error_in_words(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tiny_new(tmp_path / "model")
    change_config(folder, **change)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_damaged_weights_are_an_error_in_words(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="SafetensorError"):
        load(folder)


def test_trusted_code_is_used(tmp_path: Path) -> None:
    folder = tiny_new(tmp_path / "model")
    assert native_config(ModelConfig(name_or_path=str(folder), trust_remote_code=True), folder) == (None, None)
