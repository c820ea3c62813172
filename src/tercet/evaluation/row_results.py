"""What a model does on each row of a split: the numbers that the gate compares, as two tables.

queries     a row for each distinct anchor: its nDCG@10 and MRR@10, and its ten nearest texts of the corpus
triplets    a row for each triplet: whether the positive is nearer than the negative

Both have the texts and labels beside the numbers, so that a user can look at what got worse. The means of their columns
are the metrics of evaluate.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tercet.data.row_checks import is_text
from tercet.evaluation.evaluate import make_evaluator
from tercet.evaluation.evaluators import RetrievalEvaluator, TripletsEvaluator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

K = 10
"""Length of a ranked list: of the metrics, and of the neighbours that are kept."""
TRIPLET_METRIC = "triplet_accuracy"


@dataclass(frozen=True)
class RowResults:
    """Results of one model on one split."""

    queries: pa.Table
    """anchor, positive (of the first row with that anchor), its labels, ndcg@10, mrr@10; neighbours, scores: lists of
    ten, best first, -1 and 0 where the corpus has fewer texts."""
    triplets: pa.Table | None
    """anchor, positive, negative, labels, triplet_accuracy (1 or 0); None where the data are pairs."""
    num_corpus_texts: int
    seconds_per_text: float
    """Time to embed one text, on the machine that measured."""


def row_results(
    model: Any, splits: dict[str, Dataset], split: str, batch_size: int, precision: str = "fp32"
) -> RowResults:
    """Evaluate a model that one process holds whole, row by row. Raises NonFiniteError.

    splits: as for `make_evaluator`; `split` has its label columns too. precision: in which a GPU encodes."""
    evaluator, rows = make_evaluator(splits, split, batch_size, keep_hits=True, precision=precision), splits[split]
    evaluator(model)
    labels = [name for name in rows.column_names if not is_text(name)]
    encodings, triplets = evaluator.encodings, evaluator.triplets
    return RowResults(
        queries=_query_table(rows, labels, evaluator.retrieval),
        triplets=None if triplets is None else _triplet_table(rows, labels, triplets),
        num_corpus_texts=len(evaluator.retrieval.corpus),
        seconds_per_text=encodings.seconds / max(encodings.num_encoded, 1),
    )


def ndcg(ranked_ids: Sequence[str], relevant_ids: Collection[str], k: int) -> float:
    """Return the nDCG of a ranked list, best first, cut after k: the gain of its relevant texts as a share of the
    largest gain possible. A relevant text gains 1 / log2(rank + 1), where ranks start at 1."""
    ranks = [rank for rank, text_id in enumerate(ranked_ids[:k], start=1) if text_id in relevant_ids]
    ideal_ranks = range(1, min(len(relevant_ids), k) + 1)
    return float(sum(1 / np.log2(rank + 1) for rank in ranks) / sum(1 / np.log2(rank + 1) for rank in ideal_ranks))


def reciprocal_rank(ranked_ids: Sequence[str], relevant_ids: Collection[str], k: int) -> float:
    """Return 1 / rank of the first relevant text among the k best, or 0 if there is none. Its mean is MRR@k."""
    return next((1 / rank for rank, text_id in enumerate(ranked_ids[:k], start=1) if text_id in relevant_ids), 0.0)


def _query_table(rows: Dataset, labels: Sequence[str], retrieval: RetrievalEvaluator) -> pa.Table:
    import pyarrow as pa

    first_rows: dict[str, int] = {}
    for number, anchor in enumerate(rows["anchor"]):
        first_rows.setdefault(anchor, number)
    columns = {name: _selected(rows[name], list(first_rows.values())) for name in ("anchor", "positive", *labels)}
    # Of equal scores, the lower id comes first, as in InformationRetrievalEvaluator.
    ranked = [sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))[:K] for hits in retrieval.hits]
    ids = [[hit["corpus_id"] for hit in hits] for hits in ranked]
    relevant = [retrieval.relevant_docs[query_id] for query_id in retrieval.queries_ids]
    for name, metric in ((f"ndcg@{K}", ndcg), (f"mrr@{K}", reciprocal_rank)):
        columns[name] = pa.array([metric(*lists, K) for lists in zip(ids, relevant, strict=True)])
    neighbours = [[int(text_id.removeprefix("text-")) for text_id in text_ids] for text_ids in ids]
    scores = [[float(hit["score"]) for hit in hits] for hits in ranked]
    columns["neighbours"] = pa.array([_padded(numbers, -1) for numbers in neighbours], pa.list_(pa.int64()))
    columns["scores"] = pa.array([_padded(values, 0.0) for values in scores], pa.list_(pa.float64()))
    return pa.table(columns)


def _triplet_table(rows: Dataset, labels: Sequence[str], triplets: TripletsEvaluator) -> pa.Table:
    import pyarrow as pa

    num_negatives = len(triplets.anchors) // len(rows)
    columns = {"anchor": triplets.anchors, "positive": triplets.positives, "negative": triplets.negatives}
    columns |= {name: list(rows[name]) * num_negatives for name in labels}
    return pa.table({**columns, TRIPLET_METRIC: triplets.is_right.double().cpu().numpy()})


def _padded(values: list[Any], filler: Any) -> list[Any]:
    return values + [filler] * (K - len(values))


def _selected(column: Any, numbers: Sequence[int]) -> list[str]:
    texts = list(column)
    return [texts[number] for number in numbers]
