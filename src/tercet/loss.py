"""The loss named in a recipe, as sentence-transformers makes it."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric

from tercet.loss_config import LossConfig, TripletLossConfig

_DISTANCES = {
    "euclidean": TripletDistanceMetric.EUCLIDEAN,
    "cosine": TripletDistanceMetric.COSINE,
    "manhattan": TripletDistanceMetric.MANHATTAN,
}


def make_loss(config: LossConfig, model: SentenceTransformer) -> Any:
    """The loss named in the recipe, around the model."""
    if isinstance(config, TripletLossConfig):
        return losses.TripletLoss(
            model, distance_metric=_DISTANCES[config.distance_metric], triplet_margin=config.triplet_margin
        )
    return losses.MultipleNegativesRankingLoss(
        # sentence-transformers 6.2 asks for the rank of a process group even where there is none to gather from.
        model,
        scale=config.scale,
        gather_across_devices=config.gather_across_devices and torch.distributed.is_initialized(),
    )
