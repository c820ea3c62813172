"""Each further family of encoders and decoders, packed: the trial lets it through, and embeddings, loss and all
gradients are those of sentence-transformers' own forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from transformers import cache_utils, masking_utils

from support.packed_runs import LENGTHS, assert_equal, columns, config, run
from support.tiny_families import DECODERS, FURTHER, tiny_encoder
from support.tiny_model import all_texts
from tercet.model.packed_model import prepare
from tercet.model.packing_trial import MAX_ERROR, choose_packing, try_rows

pytestmark = pytest.mark.usefixtures("one_thread")

BIDIRECTIONAL = [family for family in FURTHER if family not in DECODERS or family == "embeddinggemma"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a new model of a family, in training mode: decoders pool the last token, and are padded on the left."""

    @cache
    def folder(family: str, pooling: str, padding_side: str) -> Path:
        path = tmp_path_factory.mktemp("family")
        return tiny_encoder(path, family, all_texts(), pooling, padding_side=padding_side)

    def make(family: str) -> Any:
        usual = ("mean", "right") if family in BIDIRECTIONAL else ("lasttoken", "left")
        model = SentenceTransformer(str(folder(family, *usual)), device="cpu").train()
        assert model.tokenizer.padding_side == usual[1]
        return model

    return make


@pytest.mark.parametrize("family", FURTHER)
def test_the_trial_lets_it_through(load: Any, family: str) -> None:
    model = load(family)
    trial = try_rows(model)
    assert trial.refusal is None
    assert 0 < trial.error < MAX_ERROR / 10
    assert choose_packing(model, "auto")[0] == "packed"


@pytest.mark.parametrize("lengths", ["mixed", "edges"])
@pytest.mark.parametrize("family", FURTHER)
def test_a_row_gives_what_each_column_gives(load: Any, family: str, lengths: str) -> None:
    texts = columns(LENGTHS[lengths])
    assert_equal(run(load(family), texts, "packed"), run(load(family), texts, "plain"), 2e-5)


@pytest.mark.parametrize("family", ["gte", "qwen2", "embeddinggemma"])
@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedGISTEmbedLoss"])
def test_a_cached_loss_and_a_guide(load: Any, family: str, name: str) -> None:
    loss, texts = config(name, mini_batch_size=4), columns(LENGTHS["mixed"])
    found, expected = (
        run(load(family), texts, way, loss, guide=load("qwen3").eval() if "GIST" in name else None)
        for way in ("packed", "plain")
    )
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("family", ["nomic_bert", "eurobert", "mistral", "gemma3_text"])
def test_encoding(load: Any, family: str) -> None:
    texts = [text for column in columns(LENGTHS["mixed"]) + columns(LENGTHS["edges"]) for text in column]
    model = load(family).eval()
    expected = model.encode(texts, batch_size=5)
    prepare(model, "packed")
    assert abs(model.encode(texts, batch_size=5) - expected).max() < 2e-6


def test_a_decoder_is_causal_and_a_bidirectional_one_is_not(load: Any) -> None:
    """Otherwise equal results would not prove that rows are causal."""
    first, longer = (load("llama").eval().encode(text) for text in ("bafa", "bafa delo"))
    assert abs(first - longer).max() > 1e-3
    for family, is_causal in (("gemma3_text", True), ("embeddinggemma", False)):
        encoder = load(family)[0].model
        assert {layer.self_attn.is_causal for layer in encoder.layers} == {is_causal}
        assert {layer.self_attn.sliding_window for layer in encoder.layers} == {None, 5}


@pytest.mark.parametrize("family", DECODERS)
def test_no_step_looks_for_texts_by_their_positions(load: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would, which on a GPU waits for the positions. Nor does a row keep keys and values for later."""
    model = load(family)
    forward = prepare(model, "packed")
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: pytest.fail("looked at positions"))
    monkeypatch.setattr(cache_utils.DynamicCache, "update", lambda *_, **__: pytest.fail("kept keys"))
    forward.embed(model, [model.preprocess(column) for column in columns(LENGTHS["mixed"])])
