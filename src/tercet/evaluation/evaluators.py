"""The evaluators of sentence-transformers 6.2, changed in two things.

No text is encoded twice in one evaluation: a split's positives are in the retrieval corpus already when the triplets
are compared, and its anchors were the queries.

Where there is a process group, its ranks share the work. Every rank must run the evaluator, on the same data: where
weights are sharded (ZeRO-3, FSDP2) a forward pass is collective, and one rank with a pass more or less is a hang. So
each rank makes the same number of passes, and every one of them ends with the same embeddings and metrics, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.evaluation import (
    InformationRetrievalEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import batch_to_device
from torch.distributed.fsdp import FSDPModule

from tercet.config.losses import GuidedLossConfig, LossConfig
from tercet.config.sections import role_of
from tercet.errors import NonFiniteError
from tercet.model.collectives import gather
from tercet.model.loss import loss_value, make_loss

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLE_CHARS = 80

Hit = dict[str, Any]  # corpus_id and score


class Encodings:
    """Embeddings of the texts of one evaluation, by role (query or document: a model may have a prompt for each)."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}
        self._embeddings: list[torch.Tensor] = []
        self.num_encoded, self.seconds = 0, 0.0
        """Texts that were encoded since this was made, and the time that it took."""

    def clear(self) -> None:
        """Forget everything: the model has changed."""
        self._rows.clear()
        self._embeddings.clear()

    def check(self, step: int) -> None:
        """Raises NonFiniteError where an embedding is NaN or Inf: the evaluators would take it for merely far away."""
        wrong = ~torch.cat(self._embeddings).isfinite().all(dim=1)
        if wrong.any():
            text = next(text for (_, text), row in self._rows.items() if wrong[row])
            raise NonFiniteError(
                f"evaluation{f' at step {step}' if step >= 0 else ''}: the embeddings of {int(wrong.sum())} of "
                f"{len(wrong)} texts are NaN or Inf, such as that of {text[:EXAMPLE_CHARS]!r}",
                hint=NOT_FINITE_HINT,
            )

    def of(self, model: Any, texts: list[str], role: str, batch_size: int) -> torch.Tensor:
        """Shape (len(texts), embedding width), fp32; only the texts not seen yet are encoded, shared by all ranks."""
        new = [text for text in dict.fromkeys(texts) if (role, text) not in self._rows]
        if new:
            start, began = sum(len(block) for block in self._embeddings), time.monotonic()
            self._embeddings.append(_encode(model, new, role, batch_size))
            self.num_encoded, self.seconds = self.num_encoded + len(new), self.seconds + time.monotonic() - began
            self._rows.update({(role, text): start + index for index, text in enumerate(new)})
        self._embeddings = [torch.cat(self._embeddings)]
        return self._embeddings[0][[self._rows[role, text] for text in texts]]


def num_sharing_ranks(model: Any) -> int:
    """How many ranks run this evaluation together: 1 without a process group.

    And 1 inside of sentence-transformers' `distributed_evaluation`. There one rank runs the evaluator, and the others
    wait for slices of what it encodes: they would not take part in anything that is asked of them here."""
    if not (dist.is_available() and dist.is_initialized()) or model._distributed_inference is not None:
        return 1
    return int(dist.get_world_size())


def _encode(model: Any, texts: list[str], role: str, batch_size: int) -> torch.Tensor:
    """Shape (len(texts), embedding width), fp32, the same bits on every rank.

    Longest text first, the texts are dealt to the ranks like cards, so that the batches which run at the same time are
    about equally long. The ranks that come out one short encode the shortest text again, for nothing."""
    encode = model.encode_query if role == "query" else model.encode_document
    num_ranks = num_sharing_ranks(model)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))  # stable, so the same on every rank
    texts_per_rank = math.ceil(len(texts) / num_ranks)
    dealt = order + [order[-1]] * (texts_per_rank * num_ranks - len(texts))
    own = texts if num_ranks == 1 else [texts[index] for index in dealt[dist.get_rank() :: num_ranks]]
    embeddings = encode(own, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True).float()
    if num_ranks == 1:
        return embeddings
    place = {index: (turn % num_ranks) * texts_per_rank + turn // num_ranks for turn, index in enumerate(order)}
    return torch.cat(gather(embeddings))[[place[index] for index in range(len(texts))]]


def _pass_without_inference_mode(model: Any) -> None:
    """FSDP2 makes the tensors that it gathers weights into in the first pass. Were that one of `encode`, which is in
    inference mode, the model could not be trained any more: "Inference tensors cannot be saved for backward"."""
    model.eval()
    with torch.no_grad():
        model(batch_to_device(model.preprocess(["a"]), model.device))


class RetrievalEvaluator(InformationRetrievalEvaluator):  # type: ignore[misc]
    """Replaces two methods of `InformationRetrievalEvaluator`: one encodes whatever it is given, the other compares
    every query with the corpus on every rank."""

    encodings: Encodings
    queries_ids: list[str]
    queries: list[str]
    on_hits: Callable[[list[list[Hit]]], None] | None = None
    """Gets what each query found, its ten best among others."""

    def compute_metrics(self, queries_result_list: list[list[Hit]]) -> dict[str, dict[int, float]]:
        """Means over queries, by name and k."""
        if self.on_hits is not None:
            self.on_hits(queries_result_list)
        metrics: dict[str, dict[int, float]] = super().compute_metrics(queries_result_list)
        return metrics

    def compute_all_metrics(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, dict[int, float]]]:
        """Metrics by score function, name and k. Each is a mean over queries, so ranks share the queries."""
        num_ranks = num_sharing_ranks(model)
        scores: dict[str, dict[str, dict[int, float]]]
        if num_ranks == 1:
            scores = super().compute_all_metrics(model, *args, **kwargs)
            return scores
        # Before the queries are shared: every rank must ask for the same texts. The corpus stays whole.
        device = self.embed_inputs(model, self.queries, "query").device
        everything: tuple[list[str], list[str]] = self.queries_ids, self.queries
        own = slice(dist.get_rank(), None, num_ranks)
        num_own = len(everything[0][own])
        try:
            # A rank without a query takes one that counts for nothing.
            self.queries_ids, self.queries = (values[own] or values[:1] for values in everything)
            scores = super().compute_all_metrics(model, *args, **kwargs)
        finally:
            self.queries_ids, self.queries = everything
        return _mean_over_ranks(scores, num_own, device)

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> torch.Tensor:
        """Shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size)


def _mean_over_ranks(
    scores: dict[str, dict[str, dict[int, float]]], num_queries: int, device: torch.device
) -> dict[str, dict[str, dict[int, float]]]:
    """Means over all queries, from each rank's over its own."""
    values = [value for by_name in scores.values() for by_k in by_name.values() for value in by_k.values()]
    sums = torch.tensor([[num_queries * value for value in (1.0, *values)]], dtype=torch.float64, device=device)
    num_all, *totals = torch.cat(gather(sums)).sum(dim=0).tolist()
    means = (total / num_all for total in totals)
    return {
        function: {name: {k: next(means) for k in by_k} for name, by_k in by_name.items()}
        for function, by_name in scores.items()
    }


class TripletsEvaluator(TripletEvaluator):  # type: ignore[misc]
    """Replaces `TripletEvaluator.embed_inputs`, which encodes whatever it is given."""

    encodings: Encodings
    is_right: torch.Tensor
    """Of each triplet in the last evaluation, whether the positive is nearer than the negative."""

    def _get_similarity_functions(self) -> dict[str, Any]:
        functions: dict[str, Any] = super()._get_similarity_functions()

        def cosine(*embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
            positive, negative = functions["cosine"](*embeddings)
            self.is_right = positive > negative + self.margin["cosine"]
            return positive, negative

        return {"cosine": cosine}

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> Any:
        """NumPy array of shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size).cpu().numpy()


class EncodeOnceEvaluator(SequentialEvaluator):  # type: ignore[misc]
    """Runs evaluators in turn over shared encodings."""

    def __init__(self, evaluators: list[Any]) -> None:
        super().__init__(evaluators)
        self.encodings = Encodings()
        for evaluator in evaluators:
            evaluator.encodings = self.encodings

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Metrics by name, of all evaluators. Raises NonFiniteError, on all ranks."""
        if isinstance(model, FSDPModule):
            _pass_without_inference_mode(model)
        try:
            metrics: dict[str, float] = super().__call__(model, output_path, epoch, steps)
            self.encodings.check(steps)
        finally:
            self.encodings.clear()
        return metrics


class SplitLoss:
    """An evaluator beside those of evaluators.py. No text is encoded for it that they have encoded."""

    encodings: Encodings

    def __init__(self, loss: Any, rows: Dataset, rows_at_once: int, batch_size: int) -> None:
        """rows_at_once: rows that are in-batch negatives of each other. batch_size: texts encoded at a time."""
        self._loss, self._rows, self._rows_at_once, self._batch_size = loss, rows, rows_at_once, batch_size

    def __call__(self, model: Any, *_: Any) -> dict[str, float]:
        """The mean over rows; the last batch may have fewer. The same on every rank."""
        columns = [
            self.encodings.of(model, list(self._rows[name]), role_of(name), self._batch_size)
            for name in self._rows.column_names
        ]
        total = 0.0
        for start in range(0, len(self._rows), self._rows_at_once):
            batch = [embeddings[start : start + self._rows_at_once] for embeddings in columns]
            total += len(batch[0]) * loss_value(self._loss, batch)
        return {"loss": total / len(self._rows)}


def split_loss(config: LossConfig, model: Any, rows: Dataset, rows_at_once: int, batch_size: int) -> SplitLoss | None:
    """None for a loss with a guide, which reads texts and not embeddings.

    Every rank has all embeddings: none are gathered. A Matryoshka uses all of its widths, not a few drawn at random."""
    if isinstance(config, GuidedLossConfig):
        return None
    changes: dict[str, Any] = {"gather_across_devices": False} if config.crosses_ranks else {}
    if config.matryoshka is not None:
        changes["matryoshka"] = config.matryoshka.model_copy(update={"dims_per_step": None})
    loss = make_loss(config.model_copy(update=changes), model)
    return SplitLoss(loss, rows, rows_at_once, batch_size)


NOT_FINITE_HINT = "lower training.learning_rate, raise training.warmup_ratio, or look for broken rows"


def require_finite(metrics: dict[str, Any], what: str) -> dict[str, float]:
    """The numbers as plain floats. Raises NonFiniteError naming the first that is NaN or Inf.

    Plain, because Ray Train 2.60 ends a run over a numpy.float32, and finite, because it lets NaN win as best."""
    plain = {name: float(value) for name, value in metrics.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{what}: {name} is {value}", hint=NOT_FINITE_HINT)
    return plain
