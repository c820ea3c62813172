"""The loss on a frozen split, from the embeddings that its metrics are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tercet.evaluators import Encodings
from tercet.given_embeddings import loss_value
from tercet.loss import make_loss
from tercet.loss_config import GuidedLossConfig, LossConfig
from tercet.sections import role_of

if TYPE_CHECKING:
    from datasets import Dataset


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
