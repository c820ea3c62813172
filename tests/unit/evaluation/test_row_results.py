"""Results row by row: metrics of one ranked list, compared with those of sentence-transformers' evaluator."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from support import tiny_model
from tercet.evaluation.encodings import Encodings
from tercet.evaluation.evaluate import evaluate
from tercet.evaluation.evaluators import RetrievalEvaluator
from tercet.evaluation.row_results import ndcg, reciprocal_rank, row_results

KS = (1, 3, 10, 50)


def librarys_own(hits: list[dict[str, object]], relevant_ids: set[str], k: int) -> tuple[float, float]:
    """Return nDCG and MRR of sentence-transformers' evaluator with a single query."""
    evaluator = InformationRetrievalEvaluator(
        {"q": "a query"}, {"text-0": "a text"}, {"q": relevant_ids}, ndcg_at_k=[k], mrr_at_k=[k], write_csv=False
    )
    metrics = evaluator.compute_metrics([hits])
    return float(metrics["ndcg@k"][k]), float(metrics["mrr@k"][k])


@pytest.mark.parametrize("num_texts", [1, 4, 12, 40])
def test_metrics_of_a_ranked_list_are_sentence_transformers_own(num_texts: int) -> None:
    """Equal in every bit, with several relevant texts, more of them than k, ties, and k larger than the corpus."""
    rng = random.Random(num_texts)
    for _ in range(200):
        ids = [f"text-{number}" for number in range(num_texts)]
        relevant_ids = set(rng.sample(ids, rng.randint(1, num_texts)))
        # Few distinct scores, so that many are equal.
        hits = [{"corpus_id": text_id, "score": rng.randrange(5) / 4} for text_id in rng.sample(ids, num_texts)]
        ranked = [hit["corpus_id"] for hit in sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))]
        for k in KS:
            assert (ndcg(ranked, relevant_ids, k), reciprocal_rank(ranked, relevant_ids, k)) == librarys_own(
                hits, relevant_ids, k
            )


def test_metrics_by_hand() -> None:
    assert ndcg("abc", "a", 10) == reciprocal_rank("abc", "a", 10) == 1.0
    assert ndcg("abc", "b", 10) == pytest.approx(1 / np.log2(3))
    assert ndcg("abc", "bc", 10) == pytest.approx((1 / np.log2(3) + 1 / 2) / (1 + 1 / np.log2(3)))
    assert reciprocal_rank("abc", "bc", 10) == 0.5
    assert ndcg("abc", "c", 2) == reciprocal_rank("abc", "c", 2) == 0.0


class Embedded:
    """A model that looks up the embedding of a text."""

    _distributed_inference = None
    similarity_fn_name = "cosine"
    device = torch.device("cpu")

    def __init__(self, embeddings: dict[str, torch.Tensor]) -> None:
        self._embeddings = embeddings
        self.model_card_data = self

    def set_evaluation_metrics(self, *_: object) -> None:
        pass

    def encode_query(self, texts: list[str], **_: object) -> torch.Tensor:
        return torch.stack([self._embeddings[text] for text in texts])

    encode_document = encode_query


def test_a_corpus_with_copies_is_ranked_as_the_evaluator_ranks_it() -> None:
    """Texts with equal embeddings tie; their order is by id, and the metrics are those of the evaluator."""
    generator = torch.Generator().manual_seed(0)
    corpus = {f"text-{number}": f"text {number}" for number in range(60)}
    queries = {f"query-{number}": f"query {number}" for number in range(30)}
    relevant_ids = {query_id: {f"text-{number}", f"text-{number + 7}"} for number, query_id in enumerate(queries)}
    places = torch.randn((12, 6), generator=generator)
    embeddings = {text: places[number % 12] for number, text in enumerate(corpus.values())}
    embeddings |= {text: torch.randn(6, generator=generator) for text in queries.values()}
    evaluator = RetrievalEvaluator(Encodings(), queries, corpus, relevant_ids, 8, keep_hits=True)
    metrics = evaluator(Embedded(embeddings))
    ranked = [
        [hit["corpus_id"] for hit in sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))]
        for hits in evaluator.hits
    ]
    lists = list(zip(ranked, relevant_ids.values(), strict=True))
    assert float(np.mean([ndcg(*pair, 10) for pair in lists])) == metrics["cosine_ndcg@10"]
    assert np.mean([reciprocal_rank(*pair, 10) for pair in lists]) == pytest.approx(metrics["cosine_mrr@10"])


def test_means_over_rows_are_the_metrics(tmp_path: Path) -> None:
    folder = tiny_model.tiny_bert(tmp_path / "bert", tiny_model.all_texts())
    model = SentenceTransformer(str(folder), device="cpu")
    rows = tiny_model.triplets(12)
    whole = Dataset.from_dict({name: [row[name] for row in rows] for name in ("anchor", "positive", "negative")})
    splits = {"train": whole.select(range(4)), "eval": whole.select(range(4, 12))}
    results = row_results(model, splits, "eval", 8)
    assert results.triplets is not None
    tables = {"ndcg@10": results.queries, "mrr@10": results.queries, "triplet_accuracy": results.triplets}
    means = {name: float(np.mean(table[name].to_numpy())) for name, table in tables.items()}
    assert means == pytest.approx(evaluate(model, splits, "eval", 8), abs=1e-6)
    num_texts = results.num_corpus_texts
    assert num_texts == len({*whole["positive"]})
    for ids, scores in zip(
        results.queries["neighbours"].to_pylist(), results.queries["scores"].to_pylist(), strict=True
    ):
        assert len(ids) == len(scores) == 10
        assert scores == sorted(scores, reverse=True) or num_texts < 10
        assert ids[num_texts:] == [-1] * max(10 - num_texts, 0)
