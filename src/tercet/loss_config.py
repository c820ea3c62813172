"""The losses of a recipe, by their names in sentence-transformers, with their parameters checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from tercet.sections import Section


class TripletLossConfig(Section):
    """`max(d(a, p) - d(a, n) + margin, 0)`: Hermans et al. 2017, arXiv 1703.07737."""

    name: Literal["TripletLoss"]
    distance_metric: Literal["euclidean", "cosine", "manhattan"] = "euclidean"
    triplet_margin: PositiveFloat = 5.0


class RankingLossConfig(Section):
    """Cross-entropy of the positive among all candidates of the batch: Henderson et al. 2017, arXiv 1705.00652."""

    name: Literal["MultipleNegativesRankingLoss"]
    scale: PositiveFloat = 20.0
    gather_across_devices: bool = True
    """Take the negatives from the whole global batch, so that the number of workers does not change the loss."""


LossConfig = Annotated[TripletLossConfig | RankingLossConfig, Field(discriminator="name")]
