"""The loaded model is what the recipe says: its type, its prompts, and which weights are trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from support.tiny_model import WORDS, all_texts, tiny_bert
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError
from tercet.model.encoder import freeze_unused, load_model, stored_model
from tercet.training.arguments import column_prompts

PROMPTS = {"query": WORDS[0] + ": ", "document": WORDS[1] + ": "}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder") / "base", all_texts(), dense_features=8)


def config(folder: Path, **values: Any) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), **values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_fp32_whatever_the_files_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny_bert(tmp_path / "base", all_texts(), dense_features=8)
    stored = {}
    for path in folder.rglob("model.safetensors"):
        tensors = {name: value.to(dtype) for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
        stored.update(tensors)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": str(dtype).removeprefix("torch.")}))
    model = load_model(config(folder), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(dict(model.named_parameters())["2.linear.weight"], stored["linear.weight"].float())


def test_prompts_are_saved_with_the_model(base: Path, tmp_path: Path) -> None:
    load_model(config(base, prompts=PROMPTS), "cpu").save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["prompts"] == PROMPTS
    plain, without = (SentenceTransformer(str(folder), device="cpu") for folder in (tmp_path, base))
    text = WORDS[5]
    for encode, prompt in ((plain.encode_query, PROMPTS["query"]), (plain.encode_document, PROMPTS["document"])):
        assert abs(encode(text) - without.encode(prompt + text)).max() < 1e-6
        assert abs(encode(text) - without.encode(text)).max() > 1e-3


def test_without_prompts_in_the_recipe_the_models_own_stay(base: Path, tmp_path: Path) -> None:
    load_model(config(base, prompts=PROMPTS), "cpu").save_pretrained(str(tmp_path))
    assert load_model(config(tmp_path), "cpu").prompts == PROMPTS


COLUMNS = ("anchor", "positive", "negative")


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ({"query": "q ", "document": "d "}, {"anchor": "q ", "positive": "d ", "negative": "d "}),
        ({"query": "q ", "document": ""}, {"anchor": "q "}),
        ({"document": "d "}, {"positive": "d ", "negative": "d "}),
        ({"query": None, "document": None}, None),
        ({"other": "o "}, None),
        ({}, None),
    ],
)
def test_prompts_of_the_columns(prompts: dict[str, str | None], wanted: dict[str, str] | None) -> None:
    assert column_prompts(COLUMNS, prompts) == wanted


def test_only_the_pooler_is_frozen(base: Path) -> None:
    model = load_model(config(base), "cpu")
    freeze_unused(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"0.model.pooler.dense.weight", "0.model.pooler.dense.bias"}
    model({**model.tokenize(WORDS[:2])})["sentence_embedding"].square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == frozen, "every other weight takes part, and no frozen one would have"


def test_a_stored_model_differs_only_in_its_location(base: Path, tmp_path: Path) -> None:
    named = ModelConfig(name_or_path="hub/name", revision="abc", sha256="0" * 64, max_seq_length=9, pooling="mean")
    stored = stored_model(named, tmp_path)
    assert (stored.name_or_path, stored.revision, stored.sha256) == (str(tmp_path), None, None)
    assert (stored.max_seq_length, stored.pooling) == (9, "mean")
    assert load_model(stored_model(named, base), "cpu").max_seq_length == 9


@pytest.mark.parametrize("values", [{"pooling": "cls"}, {"dense_features": 9}])
def test_an_architecture_other_than_the_recipes_is_refused(base: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        load_model(config(base, **values), "cpu")


def test_a_folder_without_a_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    with pytest.raises(ConfigError, match="the tokenizer knows no words"):
        load_model(ModelConfig(name_or_path=str(folder)), "cpu")
