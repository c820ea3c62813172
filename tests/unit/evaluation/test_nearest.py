"""The nearest texts are those of sentence-transformers' evaluator, ties included, in blocks of any size."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.evaluation.nearest import Hits, Nearest, nearest

K = 10


class Library(InformationRetrievalEvaluator):  # type: ignore[misc]
    """sentence-transformers' evaluator, with given embeddings. Its hits are kept."""

    def __init__(self, queries: torch.Tensor, texts: torch.Tensor, ids: list[str], texts_at_once: int) -> None:
        names = [f"query-{number}" for number in range(len(queries))]
        super().__init__(
            {name: name for name in names},
            {text_id: text_id for text_id in ids},
            {name: {ids[0]} for name in names},
            corpus_chunk_size=texts_at_once,
            map_at_k=[K],
            write_csv=False,
            score_functions={"cosine": cos_sim},
        )
        self.embeddings = {**dict(zip(names, queries, strict=True)), **dict(zip(ids, texts, strict=True))}

    def embed_inputs(self, model: Any, sentences: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        return torch.stack([self.embeddings[text] for text in sentences])

    def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, dict[int, float]]:
        self.hits = queries_result_list
        metrics: dict[str, dict[int, float]] = super().compute_metrics(queries_result_list)
        return metrics


def exact(num: int, generator: torch.Generator) -> torch.Tensor:
    """Embeddings of length 2, of four ones with signs: cosines are multiples of a quarter, without rounding."""
    places = torch.rand((num, 6), generator=generator).argsort(dim=1)[:, :4]
    signs = torch.randint(0, 2, (num, 4), generator=generator) * 2.0 - 1
    return torch.zeros(num, 6).scatter(1, places, signs)


def hits_of(queries: torch.Tensor, texts: torch.Tensor, ids: list[str], **blocks: int) -> Hits:
    order = sorted(ids)
    places = torch.tensor([order.index(text_id) for text_id in ids])
    return Hits(nearest(queries, len(texts), lambda part: texts[part], places, K, **blocks), order)


@pytest.mark.parametrize("seed", range(30))
def test_hits_are_those_of_sentence_transformers(seed: int) -> None:
    """With many ties: few distinct cosines, and copies of texts."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_queries, num_texts = rng.randint(1, 40), rng.choice([1, 3, 9, 10, 11, 25, 120])
    queries, texts = exact(num_queries, generator), exact(num_texts, generator)
    ids = [f"text-{number}" for number in rng.sample(range(1000), num_texts)]
    texts_at_once = rng.choice([1, 4, 10, 11, 30, 50_000])
    library = Library(queries, texts, ids, texts_at_once)
    metrics = library.compute_all_metrics(None)["cosine"]
    for max_bytes in (1, 64, 4 * texts_at_once * rng.randint(1, 7), 2**20):
        hits = hits_of(queries, texts, ids, max_bytes=max_bytes, texts_at_once=texts_at_once)
        assert list(hits) == library.hits
        assert library.compute_metrics(list(hits)) == metrics


def test_scores_that_round_are_those_of_sentence_transformers() -> None:
    """In every bit, in one block as in several large ones."""
    generator = torch.Generator().manual_seed(0)
    queries, texts = (torch.randn((num, 64), generator=generator) for num in (1500, 4000))
    ids = [f"text-{number}" for number in range(len(texts))]
    library = Library(queries, texts, ids, 50_000)
    library.compute_all_metrics(None)
    for num_blocks in (1, 3):
        assert list(hits_of(queries, texts, ids, max_bytes=4 * 4000 * 1500 // num_blocks)) == library.hits


def test_embeddings_that_are_not_finite_are_no_error_here() -> None:
    """The evaluation raises one afterwards, which names the text."""
    queries, texts = torch.randn(5, 4), torch.randn(30, 4)
    texts[3] = torch.nan
    queries[1] = torch.nan
    assert len(list(hits_of(queries, texts, [f"text-{number}" for number in range(30)], max_bytes=300))) == 5


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("tied", [False, True])
def test_memory_does_not_grow_with_the_number_of_queries(tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.ones(3000, 4) if tied else torch.randn((3000, 4), generator=generator)
    for num_queries in (100, 1500):
        with LargestTensor() as largest:
            found = nearest(torch.ones(num_queries, 4), 3000, lambda part: texts[part], torch.arange(3000), K, 200_000)
        assert isinstance(found, Nearest)
        assert largest.num_bytes <= 200_000
    if tied:
        assert found.places.tolist() == [list(range(K))] * num_queries
