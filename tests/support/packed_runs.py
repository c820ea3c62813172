"""Embeddings, loss and gradients of a model for a few texts, packed, in chunks or plain, and their comparison."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer

from support.tiny_families import MAX_LENGTH
from support.tiny_model import all_texts
from tercet.config.losses import LossConfig
from tercet.model.loss import make_loss
from tercet.model.packed_model import Forward, prepare

Columns = list[list[str]]
Run = tuple[list[torch.Tensor], float, dict[str, torch.Tensor]]

# Tokens of each text without [CLS] and [SEP]: none, one, equal lengths, the longest possible and longer, far apart.
LENGTHS = {
    "mixed": [[3, 1, 7, 5, 2, 9], [12, 4, 30, 1, 8, 8], [6, 6, 2, 20, 11, 3]],
    "edges": [[0, 1, 1], [MAX_LENGTH - 2, MAX_LENGTH + 40, 1], [0, 2, 0]],
    "alike": [[4, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4]],
    "one row": [[2], [40], [1]],
}


def columns(lengths: list[list[int]]) -> Columns:
    draw = random.Random(7)
    return [[" ".join(draw.choices(all_texts(), k=length)) for length in column] for column in lengths]


def config(name: str, **parameters: Any) -> Any:
    guide = {"guide": "another/model"} if "GIST" in name else {}
    return TypeAdapter(LossConfig).validate_python({"name": name, **guide, **parameters})


def run(
    model: SentenceTransformer,
    texts: Columns,
    wanted: Any,
    loss: Any = None,
    prompts: tuple[str | None, ...] = (None, None, None),
    guide: SentenceTransformer | None = None,
    forward: Forward | None = None,
) -> Run:
    """Return embeddings, the loss, and gradients; the model is unusable afterwards."""
    section = loss or config("MultipleNegativesRankingLoss", scale=2.0)
    made = make_loss(section, model, guide)
    forward = forward or prepare(model, wanted, section.is_cached, guide)
    assert forward.packing == wanted, forward.reason
    features = [model.preprocess(column, prompt=prompt) for column, prompt in zip(texts, prompts, strict=True)]
    assert ("cu_seq_lens_q" in features[0]) == (wanted == "packed")
    again = [dict(column) for column in features]
    if forward.is_together:
        value = forward.loss(made, model, features)
        embeddings = forward.embed(model, again)
    else:
        value = made(features, None)
        embeddings = [model(column)["sentence_embedding"] for column in again]
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [embedding.detach() for embedding in embeddings], value.item(), gradients


def assert_equal(found: Run, expected: Run, error: float = 5e-6) -> None:
    """Compare up to rounding, at the scale of each gradient."""
    for left, right in zip(found[0], expected[0], strict=True):
        assert left.shape == right.shape
        assert float((left - right).abs().max()) < 5e-6
    assert found[1] == pytest.approx(expected[1], abs=2e-6, rel=2e-6)
    assert found[2].keys() == expected[2].keys()
    scale = max(float(gradient.abs().max()) for gradient in expected[2].values())
    assert scale > 1e-3
    for name, gradient in expected[2].items():
        assert float((found[2][name] - gradient).abs().max()) < error * max(scale, 1), name
