"""A loss of sentence-transformers 6.2 over embeddings that are there already, where it would call the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

Features = dict[str, Any]


def loss_of(
    loss: Any, columns: Sequence[Features], embeddings: Sequence[torch.Tensor], labels: torch.Tensor | None = None
) -> Any:
    """What a loss without gradient caching says of a batch. columns: the features of each column, for what else the
    loss looks at. embeddings: of each column, shape (num_rows, width)."""
    with _given_embeddings(loss):
        return loss(
            [{**features, "sentence_embedding": own} for features, own in zip(columns, embeddings, strict=True)], labels
        )


def loss_value(loss: Any, embeddings: Sequence[torch.Tensor]) -> float:
    """What a loss that looks at embeddings only says of a batch, with gradient caching or without."""
    with torch.no_grad():
        if uses_gradient_cache(loss):
            caching = loss.loss if isinstance(loss, MatryoshkaLoss) else loss
            return float(caching.calculate_loss([[own] for own in embeddings]))
        return float(loss_of(loss, [{} for _ in embeddings], embeddings))


class _Given(torch.nn.Module):  # type: ignore[misc]
    """Hands out embeddings that are among the features already."""

    def forward(self, features: Features) -> Features:
        return {"sentence_embedding": features["sentence_embedding"]}


@contextmanager
def _given_embeddings(loss: Any) -> Iterator[None]:
    """Inside, the loss finds the embeddings where it would call the model. MatryoshkaLoss holds the model, too, beside
    the loss that it holds."""
    holders: list[Any] = [holder for holder in (loss, getattr(loss, "loss", None)) if hasattr(holder, "model")]
    models, given = [holder.model for holder in holders], _Given()
    try:
        for holder in holders:
            holder.model = given
        yield
    finally:
        for holder, model in zip(holders, models, strict=True):
            holder.model = model
