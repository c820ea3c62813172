"""The evaluators of sentence-transformers 6.2, changed in one thing: no text is encoded twice in one evaluation.

A split's positives are in the retrieval corpus already when the triplets are compared, and its anchors were the
queries.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.evaluation import (
    InformationRetrievalEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)


class Encodings:
    """Embeddings of the texts of one evaluation, by role (query or document: a model may have a prompt for each)."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], int] = {}
        self._embeddings: list[torch.Tensor] = []

    def clear(self) -> None:
        """Forget everything: the model has changed."""
        self._rows.clear()
        self._embeddings.clear()

    def of(self, model: Any, texts: list[str], role: str, batch_size: int) -> torch.Tensor:
        """Shape (len(texts), embedding width); only the texts not seen yet are encoded."""
        new = [text for text in dict.fromkeys(texts) if (role, text) not in self._rows]
        if new:
            encode = model.encode_query if role == "query" else model.encode_document
            start = sum(len(block) for block in self._embeddings)
            self._embeddings.append(encode(new, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True))
            self._rows.update({(role, text): start + index for index, text in enumerate(new)})
        self._embeddings = [torch.cat(self._embeddings)]
        return self._embeddings[0][[self._rows[role, text] for text in texts]]


class RetrievalEvaluator(InformationRetrievalEvaluator):  # type: ignore[misc]
    """Replaces `InformationRetrievalEvaluator.embed_inputs`, which encodes whatever it is given."""

    encodings: Encodings

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> torch.Tensor:
        """Shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size)


class TripletsEvaluator(TripletEvaluator):  # type: ignore[misc]
    """Replaces `TripletEvaluator.embed_inputs`, which encodes whatever it is given."""

    encodings: Encodings

    def embed_inputs(self, model: Any, sentences: Any, encode_fn_name: str = "document", **_: Any) -> Any:
        """NumPy array of shape (len(sentences), embedding width)."""
        return self.encodings.of(model, list(sentences), encode_fn_name, self.batch_size).float().cpu().numpy()


class EncodeOnceEvaluator(SequentialEvaluator):  # type: ignore[misc]
    """Runs evaluators in turn over shared encodings."""

    def __init__(self, evaluators: list[Any]) -> None:
        super().__init__(evaluators)
        self._encodings = Encodings()
        for evaluator in evaluators:
            evaluator.encodings = self._encodings

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Metrics by name, of all evaluators."""
        try:
            metrics: dict[str, float] = super().__call__(*args, **kwargs)
        finally:
            self._encodings.clear()
        return metrics
