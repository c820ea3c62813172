"""Encoding on a GPU: by tokens, in a precision, in the order of the texts. The GPU is a CPU under another name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from support import tiny_model
from tercet.evaluation import encodings
from tercet.evaluation.encodings import TOKENS_AT_ONCE, encode_texts, token_batches, tokens_at_once
from tercet.evaluation.evaluate import make_evaluator

BATCH_SIZE = 3


class NamedGpu:
    """A model on the CPU that calls its device a GPU. It notes each forward pass: texts, autocast, products."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model, self.device = model, torch.device("cuda")
        self.passes: list[tuple[list[str], bool, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_document(self, texts: list[str], batch_size: int, **kwargs: Any) -> Any:
        assert batch_size == len(texts), "one forward pass"
        self.passes.append((texts, torch.is_autocast_enabled("cuda"), torch.backends.cuda.matmul.fp32_precision))
        return self.model.encode_document(texts, batch_size=batch_size, **kwargs)

    encode_query = encode_document


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    folder = tiny_model.tiny_bert(tmp_path_factory.mktemp("model") / "bert", tiny_model.all_texts())
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(autouse=True)
def _autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def texts_of(num: int) -> list[str]:
    rng = random.Random(num)
    return [" ".join(rng.choices(tiny_model.WORDS, k=rng.randint(0, 12))) + f" {number}" for number in range(num)]


def test_batches_of_tokens() -> None:
    """Each text once, in order; at most so many tokens with padding; a longer text alone; none could take one more."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = sorted((rng.choice([1, 3, 20, 100, 700]) for _ in range(rng.randint(1, 60))), reverse=True)
        limit = rng.choice([1, 50, 512])
        batches = token_batches(tokens, limit)
        assert [number for batch in batches for number in range(len(tokens))[batch]] == list(range(len(tokens)))
        for batch in batches:
            part = tokens[batch]
            assert len(part) == 1 or len(part) * max(part) <= limit
            assert batch.stop == len(tokens) or (len(part) + 1) * max(part) > limit


def test_the_batch_size_bounds_the_tokens_at_once() -> None:
    assert tokens_at_once(64, 512) == TOKENS_AT_ONCE
    assert tokens_at_once(8, 512) == 4096
    assert tokens_at_once(64, None) == tokens_at_once(1, 1e30) == TOKENS_AT_ONCE


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_gpu_encodes_by_tokens_and_in_its_precision(model: SentenceTransformer, precision: str) -> None:
    gpu, texts = NamedGpu(model), texts_of(40)
    before = torch.backends.cuda.matmul.fp32_precision
    embeddings = encode_texts(gpu, texts, "document", BATCH_SIZE, precision)
    torch.testing.assert_close(embeddings, model.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-6)
    assert sorted(text for part, _, _ in gpu.passes for text in part) == sorted(texts)
    assert 1 < len(gpu.passes) < len(texts) / BATCH_SIZE, "more short texts than BATCH_SIZE fit into its tokens"
    products = {"fp32": "ieee", "tf32": "tf32", "bf16": before}[precision]
    assert {tuple(how) for _, *how in gpu.passes} == {(precision == "bf16", products)}
    assert torch.backends.cuda.matmul.fp32_precision == before


class Counting:
    """A model on a GPU that notes how many texts each forward pass has."""

    device, max_seq_length, _distributed_inference = torch.device("cuda"), 64, None

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_document(self, texts: list[str], **_: Any) -> torch.Tensor:
        self.sizes.append(len(texts))
        return torch.zeros(len(texts), 1)

    encode_query = encode_document


@pytest.mark.parametrize("num_texts", range(60, 90))
def test_ranks_make_equal_passes_on_gpus(num_texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are sharded, a forward pass is collective."""
    sizes = []
    monkeypatch.setattr(encodings, "num_sharing_ranks", lambda _: 3)
    monkeypatch.setattr(encodings, "gather", lambda own: [own] * 3)
    for rank in range(3):
        gpu = Counting()
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        encode_texts(gpu, texts_of(num_texts), "document", BATCH_SIZE)
        sizes.append(gpu.sizes)
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(sizes[0]) > 1


def test_ranks_share_the_texts_on_gpus(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, shares = texts_of(41), list[torch.Tensor]()
    monkeypatch.setattr(encodings, "num_sharing_ranks", lambda _: 3)
    monkeypatch.setattr(encodings, "gather", lambda own: shares.append(own) or [own] * 3)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        encode_texts(NamedGpu(model), texts, "document", BATCH_SIZE)
    monkeypatch.setattr(encodings, "gather", lambda _: shares)
    embeddings = encode_texts(NamedGpu(model), texts, "document", BATCH_SIZE)
    torch.testing.assert_close(embeddings, model.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-6)


def test_scores_are_computed_in_fp32_whatever_the_training_has_switched_on(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    products = torch.backends.cuda.matmul
    rows = tiny_model.triplets(20)
    split = Dataset.from_dict({name: [row[name] for row in rows] for name in ("anchor", "positive", "negative")})
    seen: list[tuple[bool, str]] = []
    gpu = NamedGpu(model)
    evaluator = make_evaluator({"eval": split}, "eval", BATCH_SIZE, precision="bf16")
    compute_metrics = evaluator.retrieval.compute_metrics

    def noted(hits: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cuda"), products.fp32_precision))
        return compute_metrics(hits)

    monkeypatch.setattr(evaluator.retrieval, "compute_metrics", noted)
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        metrics = evaluator(gpu, str(tmp_path))
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    assert seen == [(False, "ieee")]
    assert {autocast for _, autocast, _ in gpu.passes} == {True}
    alone = make_evaluator({"eval": split}, "eval", BATCH_SIZE)(model)
    assert metrics == pytest.approx(alone, abs=1e-6)
