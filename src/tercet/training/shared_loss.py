"""The loss of a micro-batch of which the ranks have unequal shares, such as the last one of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from tercet.model.collectives import gather_rows
from tercet.model.loss import loss_of


def shared_loss(
    loss: Any, embeddings: Sequence[torch.Tensor], labels: torch.Tensor | None, shares: tuple[int, ...]
) -> torch.Tensor:
    """Return the loss of all ranks' rows: the same on each of them. Every rank must call it.

    The ranks gather the embeddings of their own rows, so the loss itself must not gather. embeddings: of this rank's
    rows, one tensor per column. shares: how many rows of each rank count."""
    gathered = [gather_rows(own, shares) for own in embeddings]
    labels = None if labels is None else gather_rows(labels, shares)
    return cast(torch.Tensor, loss_of(loss, [{} for _ in gathered], gathered, labels))
