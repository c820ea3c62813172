"""What a model does on each row of a split: the numbers that the gate compares, as two tables.

queries     a row for each distinct anchor: its nDCG@10 and MRR@10, and its ten nearest texts of the corpus
triplets    a row for each triplet: whether the positive is nearer than the negative

Both have the texts and labels beside the numbers, so that a person can look at what got worse. Their means are the
metrics of evaluation.py, because its evaluators make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tercet.data.row_checks import is_text
from tercet.evaluation.evaluate import make_evaluator
from tercet.evaluation.evaluators import Hit, RetrievalEvaluator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NUM_NEIGHBOURS = 10
OF_QUERIES = ("ndcg@10", "mrr@10")
OF_TRIPLETS = "triplet_accuracy"


@dataclass(frozen=True)
class RowResults:
    """Of one model on one split."""

    queries: pa.Table
    """anchor, positive (of the first row with that anchor), its labels, ndcg@10, mrr@10; neighbours, scores: lists of
    ten, best first, -1 and 0 where the corpus has fewer texts."""
    triplets: pa.Table | None
    """anchor, positive, negative, labels, triplet_accuracy (1 or 0); None where the data are pairs."""
    num_corpus_texts: int
    seconds_per_text: float
    """That embedding took, on the machine that measured."""


def row_results(model: Any, splits: dict[str, Dataset], split: str, batch_size: int) -> RowResults:
    """Of a model that one process holds whole. `splits`: as for `make_evaluator`; the one that is measured with its
    labels. Raises NonFiniteError."""
    import pyarrow as pa

    evaluator, rows = make_evaluator(splits, split, batch_size), splits[split]
    retrieval, *others = evaluator.evaluators
    kept: list[list[list[Hit]]] = []
    retrieval.on_hits = kept.append
    evaluator(model)
    retrieval.on_hits = None
    hits, encodings = kept[0], evaluator.encodings

    first_row: dict[str, int] = {}
    for number, anchor in enumerate(rows["anchor"]):
        first_row.setdefault(anchor, number)
    by_query = [_of_query(retrieval, number, found) for number, found in enumerate(hits)]
    labels = [name for name in rows.column_names if not is_text(name)]
    firsts = list(first_row.values())
    queries = {name: _taken(rows[name], firsts) for name in ("anchor", "positive", *labels)}
    queries |= {name: pa.array([values[name] for values in by_query]) for name in OF_QUERIES}
    neighbours = [_best(found) for found in hits]
    queries["neighbours"] = pa.array([ids for ids, _ in neighbours], pa.list_(pa.int64()))
    queries["scores"] = pa.array([scores for _, scores in neighbours], pa.list_(pa.float64()))
    return RowResults(
        queries=pa.table(queries),
        triplets=_triplets(rows, labels, others[0]) if others else None,
        num_corpus_texts=len(retrieval.corpus),
        seconds_per_text=encodings.seconds / max(encodings.num_encoded, 1),
    )


def _triplets(rows: Dataset, labels: Sequence[str], evaluator: Any) -> pa.Table:
    import pyarrow as pa

    num_negatives = len(evaluator.anchors) // len(rows)
    columns = {"anchor": evaluator.anchors, "positive": evaluator.positives, "negative": evaluator.negatives}
    columns |= {name: list(rows[name]) * num_negatives for name in labels}
    return pa.table({**columns, OF_TRIPLETS: evaluator.is_right.double().cpu().numpy()})


def _of_query(evaluator: RetrievalEvaluator, number: int, hits: list[Hit]) -> dict[str, float]:
    """The metrics of one query: those of an evaluator that has no other."""
    everything = evaluator.queries_ids, evaluator.queries
    try:
        evaluator.queries_ids, evaluator.queries = (values[number : number + 1] for values in everything)
        metrics = evaluator.compute_metrics([hits])
    finally:
        evaluator.queries_ids, evaluator.queries = everything
    return {name: float(metrics[f"{name.partition('@')[0]}@k"][10]) for name in OF_QUERIES}


def _best(hits: list[Hit]) -> tuple[list[int], list[float]]:
    """Numbers and scores of the nearest texts, in the order that the evaluator ranks them."""
    ranked = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))[:NUM_NEIGHBOURS]
    missing = NUM_NEIGHBOURS - len(ranked)
    ids = [int(hit["corpus_id"].removeprefix("text-")) for hit in ranked]
    return ids + [-1] * missing, [float(hit["score"]) for hit in ranked] + [0.0] * missing


def _taken(column: Any, numbers: Sequence[int]) -> list[str]:
    texts = list(column)
    return [texts[number] for number in numbers]
