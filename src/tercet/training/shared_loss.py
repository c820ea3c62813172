"""The loss of a micro-batch of which the ranks have unequal shares, such as the last one of a pass."""

from __future__ import annotations

from typing import Any, cast

import torch

from tercet.model.collectives import gather_rows
from tercet.model.loss import loss_of


def shared_loss(trainer: Any, model: Any, inputs: dict[str, Any], shares: tuple[int, ...]) -> torch.Tensor:
    """Return the loss of all ranks' rows: the same on each of them. Every rank must call it.

    The ranks embed their own rows and gather the embeddings, so the loss itself must not gather. inputs: of a
    micro-batch, as the trainer's collator makes them. shares: how many rows of each rank count."""
    if "batch" in inputs:
        embeddings, labels = inputs["batch"].embed(model), inputs["label"]
    else:
        features, labels = trainer.collect_features(inputs)
        if trainer._forward.is_together:
            embeddings = trainer._forward.embed(model, features)
        else:
            embeddings = [model(column)["sentence_embedding"] for column in features]
    gathered = [gather_rows(own, shares) for own in embeddings]
    labels = None if labels is None else gather_rows(labels, shares)
    return cast(torch.Tensor, loss_of(trainer.loss, [{} for _ in gathered], gathered, labels))
