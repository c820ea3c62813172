"""The evaluators of sentence-transformers 6.2, with two changes.

No text is encoded twice in one evaluation: when the triplets are compared, the split's positives are in the retrieval
corpus already, and its anchors were the queries.

In a process group, the ranks share the work. Every rank must run the evaluator, on the same data: where weights are
sharded (ZeRO-3, FSDP2) a forward pass is collective, and the run hangs if one rank makes more passes than another. So
every rank makes the same number of passes, and ends with the same embeddings and metrics, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.evaluation import (
    InformationRetrievalEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import batch_to_device, cos_sim
from torch.distributed.fsdp import FSDPModule

from tercet.config.losses import GuidedLossConfig, LossConfig
from tercet.config.sections import role_of
from tercet.errors import NonFiniteError
from tercet.evaluation.encodings import NOT_FINITE_HINT, Encodings, num_sharing_ranks
from tercet.evaluation.nearest import Hit, Hits, nearest
from tercet.model.collectives import gather
from tercet.model.loss import loss_value, make_loss
from tercet.model.precision import computing_exactly

if TYPE_CHECKING:
    from datasets import Dataset

MAX_K = 10
"""Length of the ranked lists that the metrics read."""


def _pass_without_inference_mode(model: Any) -> None:
    """Make one forward pass outside inference mode.

    FSDP2 creates the tensors into which it gathers weights in its first pass. If that were a pass of `encode`, which
    runs in inference mode, training would fail: "Inference tensors cannot be saved for backward"."""
    model.eval()
    with torch.no_grad():
        model(batch_to_device(model.preprocess(["a"]), model.device))


class RetrievalEvaluator(InformationRetrievalEvaluator):  # type: ignore[misc]
    """Retrieval with cosine similarity.

    Replaces two methods of `InformationRetrievalEvaluator`: `embed_inputs`, which encodes every text again, and
    `compute_all_metrics`, which compares all queries with the corpus at once, and on every rank."""

    queries_ids: list[str]
    queries: list[str]
    corpus: list[str]
    relevant_docs: dict[str, set[str]]

    def __init__(
        self,
        encodings: Encodings,
        queries: dict[str, str],
        corpus: dict[str, str],
        relevant_ids: dict[str, set[str]],
        batch_size: int,
        keep_hits: bool = False,
    ) -> None:
        """queries, corpus: texts by id. relevant_ids: ids of the right texts, by query id."""
        super().__init__(
            queries=queries,
            corpus=corpus,
            relevant_docs=relevant_ids,
            mrr_at_k=[MAX_K],
            ndcg_at_k=[MAX_K],
            accuracy_at_k=[1],
            precision_recall_at_k=[MAX_K],
            map_at_k=[MAX_K],
            batch_size=batch_size,
            write_csv=False,
            score_functions={"cosine": cos_sim},
        )
        self.encodings, self._keep_hits = encodings, keep_hits
        self.hits: Sequence[list[Hit]] = []
        """Hits of each query in the last evaluation, if they are kept; with several ranks, of this rank's queries."""

    def compute_all_metrics(self, model: Any, *_: Any, **__: Any) -> dict[str, dict[str, dict[int, float]]]:
        """Return metrics by score function, name and k. Each is a mean over queries, so ranks share the queries."""
        num_ranks = num_sharing_ranks(model)
        own = slice(dist.get_rank() if num_ranks > 1 else 0, None, num_ranks)
        everything, num_own = (self.queries_ids, self.queries), len(self.queries[own])
        if num_own == 0:  # a rank without a query of its own takes the first one, with weight 0
            own = slice(1)
        # All queries, before they are shared: every rank must ask for the same texts. The corpus stays whole.
        queries = self.embed_inputs(model, self.queries, "query")
        hits = Hits(
            nearest(
                queries[own],
                len(self.corpus),
                lambda texts: self.embed_inputs(model, self.corpus[texts]),
                self.get_corpus_id_ranks(),
                MAX_K,
            ),
            sorted(self.corpus_ids),
        )
        if self._keep_hits:
            self.hits = hits
        try:
            self.queries_ids, self.queries = (values[own] for values in everything)
            scores = {"cosine": self.compute_metrics(hits)}
        finally:
            self.queries_ids, self.queries = everything
        return scores if num_ranks == 1 else _mean_over_ranks(scores, num_own, queries.device)

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> torch.Tensor:
        """Return embeddings of shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size)


def _mean_over_ranks(
    scores: dict[str, dict[str, dict[int, float]]], num_queries: int, device: torch.device
) -> dict[str, dict[str, dict[int, float]]]:
    """Combine each rank's means over its own queries into means over all queries."""
    values = [value for by_name in scores.values() for by_k in by_name.values() for value in by_k.values()]
    sums = torch.tensor([[num_queries * value for value in (1.0, *values)]], dtype=torch.float64, device=device)
    num_all, *totals = torch.cat(gather(sums)).sum(dim=0).tolist()
    means = (total / num_all for total in totals)
    return {
        function: {name: {k: next(means) for k in by_k} for name, by_k in by_name.items()}
        for function, by_name in scores.items()
    }


class TripletsEvaluator(TripletEvaluator):  # type: ignore[misc]
    """Triplets with cosine similarity. Replaces `TripletEvaluator.embed_inputs`, which encodes every text again."""

    anchors: list[str]
    positives: list[str]
    negatives: list[str]
    is_right: torch.Tensor
    """Whether the positive is nearer than the negative, for each triplet of the last evaluation."""

    def __init__(self, encodings: Encodings, rows: Dataset, negatives: list[str], batch_size: int) -> None:
        """negatives: names of the columns of negatives. The triplets of the first column come first."""
        super().__init__(
            anchors=list(rows["anchor"]) * len(negatives),
            positives=list(rows["positive"]) * len(negatives),
            negatives=[text for name in negatives for text in rows[name]],
            batch_size=batch_size,
            write_csv=False,
            similarity_fn_names=["cosine"],
        )
        self.encodings = encodings

    def _get_similarity_functions(self) -> dict[str, Any]:
        functions: dict[str, Any] = super()._get_similarity_functions()

        def cosine(*embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
            positive, negative = functions["cosine"](*embeddings)
            self.is_right = positive > negative + self.margin["cosine"]
            return positive, negative

        return {"cosine": cosine}

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> Any:
        """Return embeddings as a NumPy array of shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size).cpu().numpy()


class SplitLoss:
    """The loss on a split, from embeddings that the evaluators have encoded already."""

    def __init__(self, loss: Any, rows: Dataset, rows_at_once: int, batch_size: int) -> None:
        """rows_at_once: rows that are in-batch negatives of each other. batch_size: texts encoded at a time."""
        self._loss, self._rows, self._rows_at_once, self._batch_size = loss, rows, rows_at_once, batch_size

    def __call__(self, encodings: Encodings, model: Any, *_: Any) -> dict[str, float]:
        """Return the mean over rows, the same on every rank. The last batch may be smaller."""
        columns = [
            encodings.of(model, list(self._rows[name]), role_of(name), self._batch_size)
            for name in self._rows.column_names
        ]
        total = 0.0
        for start in range(0, len(self._rows), self._rows_at_once):
            batch = [embeddings[start : start + self._rows_at_once] for embeddings in columns]
            total += len(batch[0]) * loss_value(self._loss, batch)
        return {"loss": total / len(self._rows)}


class SplitEvaluator(SequentialEvaluator):  # type: ignore[misc]
    """Runs the evaluators of one split in turn, over shared encodings."""

    def __init__(
        self,
        encodings: Encodings,
        retrieval: RetrievalEvaluator,
        triplets: TripletsEvaluator | None,
        loss: SplitLoss | None,
    ) -> None:
        """retrieval, triplets: made with the same `encodings`."""
        evaluators = (retrieval, triplets, partial(loss, encodings) if loss else None)
        super().__init__([evaluator for evaluator in evaluators if evaluator is not None])
        self.encodings, self.retrieval, self.triplets = encodings, retrieval, triplets

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return all metrics, by sentence-transformers' names. Raises NonFiniteError, on all ranks."""
        if isinstance(model, FSDPModule):
            _pass_without_inference_mode(model)
        try:
            with computing_exactly(model.device):  # but for the encoding itself, scores and losses are of fp32
                metrics: dict[str, float] = super().__call__(model, output_path, epoch, steps)
            self.encodings.check(steps)
        finally:
            self.encodings.clear()
        return metrics


def split_loss(config: LossConfig, model: Any, rows: Dataset, rows_at_once: int, batch_size: int) -> SplitLoss | None:
    """Return the recipe's loss for a split, or None for a loss with a guide, which reads texts and not embeddings.

    Every rank has all embeddings, so none are gathered. A Matryoshka loss uses all of its widths, not a random few."""
    if isinstance(config, GuidedLossConfig):
        return None
    changes: dict[str, Any] = {"gather_across_devices": False} if config.crosses_ranks else {}
    if config.matryoshka is not None:
        changes["matryoshka"] = config.matryoshka.model_copy(update={"dims_per_step": None})
    loss = make_loss(config.model_copy(update=changes), model)
    return SplitLoss(loss, rows, rows_at_once, batch_size)


def require_finite(metrics: dict[str, Any], what: str) -> dict[str, float]:
    """Return the metrics as plain floats. Raises NonFiniteError naming the first that is NaN or infinite.

    Plain, because Ray Train 2.60 fails on a numpy.float32; finite, because it would let NaN win as the best."""
    plain = {name: float(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{what}: {name} is {value}", hint=NOT_FINITE_HINT)
    return plain
