"""The losses of a recipe, by their names in sentence-transformers, with their parameters checked.

Parameters have the names and defaults of sentence-transformers 6.2, but for `gather_across_devices`, which is on: the
number of workers shall not change the loss. AnglELoss and MegaBatchMarginLoss cannot gather: they compare the rows of
one worker's micro-batch only.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from tercet.config.sections import Section

Similarity = Literal["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"]
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]

_NEGATIVE = re.compile(r"negative(_[0-9]+)?")


class MatryoshkaConfig(Section):
    """Train the first components of an embedding to do by themselves: Kusupati et al. 2022, arXiv 2205.13147.

    The loss is added up over embeddings cut to each of `dims` and scaled to length 1. So a margin of TripletLoss is
    then one between points of a unit sphere, which are at most 2 apart (euclidean)."""

    dims: tuple[PositiveInt, ...] = Field(min_length=1)
    """Widths. Name the model's own too, or the whole embedding is not trained."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Of the loss at each of `dims`. Without it, 1 each."""
    dims_per_step: PositiveInt | None = None
    """Use so many of `dims` in a step, drawn at random. Without it, all."""

    @field_validator("dims")
    @classmethod
    def _distinct(cls, dims: tuple[int, ...]) -> tuple[int, ...]:
        repeated = sorted({dim for dim in dims if dims.count(dim) > 1})
        if repeated:
            raise ValueError(f"{', '.join(map(str, repeated))} is given twice")
        return dims

    @field_validator("weights", "dims_per_step")
    @classmethod
    def _fit_dims(cls, value: Any, info: ValidationInfo) -> Any:
        num_dims = len(info.data.get("dims", ()))
        if value is None or not num_dims:  # without dims, those are the mistake
            return value
        if info.field_name == "weights" and len(value) != num_dims:
            raise ValueError(f"one weight for each of dims: there are {len(value)} for {num_dims}")
        if info.field_name == "dims_per_step" and value > num_dims:
            raise ValueError(f"cannot be more than the {num_dims} dims, not {value}")
        return value


class Loss(Section):
    """What every loss has, and can tell of itself."""

    name: str
    matryoshka: MatryoshkaConfig | None = None

    num_negatives: ClassVar[tuple[int, int | None]] = (0, None)
    """The least and the most negatives of a row that the loss works with; None: any number."""

    @property
    def is_cached(self) -> bool:
        """Whether it embeds each text twice and runs a backward pass for each mini-batch, from a hook on the loss
        (gradient caching: Gao et al. 2021, arXiv 2101.06983)."""
        return False

    @property
    def crosses_ranks(self) -> bool:
        """Whether it gathers the embeddings of all workers, so that each must have as many rows as the others."""
        return bool(getattr(self, "gather_across_devices", False))

    def column_problem(self, columns: tuple[str, ...]) -> tuple[str, str] | None:
        """What the loss needs that these text columns are not, and what to do; None where it works with them.

        Columns are `anchor`, `positive`, and `negative` or `negative_1`, `negative_2`, ..."""
        num_negatives = sum(_NEGATIVE.fullmatch(column) is not None for column in columns)
        least, most = self.num_negatives
        if num_negatives < least:
            return "needs a column `negative`", "shard the data with --negative, or choose one that works on pairs"
        if most is None or num_negatives <= most:
            return None
        others = "choose MultipleNegativesRankingLoss or CachedGISTEmbedLoss"
        if most == 0:
            return "takes no negatives but other rows' positives", f"shard the data without --negative, or {others}"
        return "takes one negative a row", f"shard the data with one --negative, or {others}"


class _Caching(Section):
    mini_batch_size: PositiveInt = 32
    """Texts embedded at a time: this, and not the batch, decides the memory of activations."""
    mini_batch_num_tokens: PositiveInt | None = None
    """Fill mini-batches up to so many tokens instead."""

    @property
    def is_cached(self) -> bool:
        return True


class _Ranking(Loss):
    scale: PositiveFloat = 20.0
    """Similarities are multiplied by it; 1 / temperature."""
    similarity_fct: Similarity = "cos_sim"
    """With dot_score, take a scale of 1."""
    gather_across_devices: bool = True
    """Take the negatives from the whole global batch, so that the number of workers does not change the loss."""


class _Directions(_Ranking):
    directions: tuple[Direction, ...] = ("query_to_doc",)
    """What is compared: a query with all documents, with the other queries; a document with all queries, with the
    documents of other rows. All four: Li et al. 2023 (GTE), arXiv 2308.03281."""
    partition_mode: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or the mean of one for each."""
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None
    """Which negatives weigh more the more similar they are: those of other rows (Lan et al. 2025, arXiv 2503.04812),
    the row's own (Schechter Vera et al. 2025, arXiv 2509.20354), or both."""
    hardness_strength: float = Field(default=0.0, ge=0.0)
    """Times the similarity, added to a negative's logit. The two papers take 9 and 5."""

    @field_validator("directions")
    @classmethod
    def _has_the_positive(cls, directions: tuple[str, ...]) -> tuple[str, ...]:
        if "query_to_doc" not in directions:
            raise ValueError("needs query_to_doc: no other direction has the positive")
        if len(set(directions)) < len(directions):
            raise ValueError("each direction once")
        return directions

    @field_validator("partition_mode")
    @classmethod
    def _each_has_the_positive(cls, partition_mode: str, info: ValidationInfo) -> str:
        without = {"query_to_query", "doc_to_doc"} & set(info.data.get("directions", ()))
        if partition_mode == "per_direction" and without:
            raise ValueError(f"does not go with {' and '.join(sorted(without))}, which lack the positive: take joint")
        return partition_mode

    @field_validator("hardness_strength")
    @classmethod
    def _both_or_none(cls, strength: float, info: ValidationInfo) -> float:
        if "hardness_mode" in info.data and (info.data["hardness_mode"] is None) != (strength == 0.0):
            mode = info.data["hardness_mode"]
            raise ValueError("without hardness_mode has no effect" if mode is None else f"must be above 0 with {mode}")
        return strength

    def column_problem(self, columns: tuple[str, ...]) -> tuple[str, str] | None:
        if self.hardness_mode == "hard_negatives" and not any(_NEGATIVE.fullmatch(column) for column in columns):
            return (
                "with hardness_mode=hard_negatives needs a column `negative`",
                "shard the data with --negative, or set loss.hardness_mode: in_batch_negatives",
            )
        return super().column_problem(columns)


class _Guided(Loss):
    guide: str = Field(min_length=1)
    """A trained model that tells false negatives: a hub name, a local folder, or `package:NAME`. It is not trained."""
    guide_revision: str | None = None
    """The commit on the hub. Pin it: a branch moves under a nightly run."""
    temperature: PositiveFloat = 0.01
    """Similarities (cosine) are divided by it."""
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    """Leave out a negative that the guide finds more similar than positive - margin, or than positive less that share
    of itself."""
    margin: float = 0.0
    contrast_anchors: bool = True
    """Other anchors are negatives too: those of the same worker only, also where positives are gathered."""
    contrast_positives: bool = True
    """Other positives are negatives of the positive too."""
    gather_across_devices: bool = True
    """Take positives and negatives from the whole global batch."""


class TripletLossConfig(Loss):
    """`max(d(a, p) - d(a, n) + margin, 0)`: Hermans et al. 2017, arXiv 1703.07737."""

    name: Literal["TripletLoss"]
    distance_metric: Literal["euclidean", "cosine", "manhattan"] = "euclidean"
    triplet_margin: PositiveFloat = 5.0

    num_negatives: ClassVar[tuple[int, int | None]] = (1, 1)


class MultipleNegativesRankingLossConfig(_Directions):
    """Cross-entropy of the positive among all candidates of the batch: Henderson et al. 2017, arXiv 1705.00652."""

    name: Literal["MultipleNegativesRankingLoss"]


class CachedMultipleNegativesRankingLossConfig(_Caching, _Directions):
    """The same in mini-batches, for batches that do not fit: Gao et al. 2021, arXiv 2101.06983."""

    name: Literal["CachedMultipleNegativesRankingLoss"]


class MultipleNegativesSymmetricRankingLossConfig(_Ranking):
    """The anchor is also sought for the positive. Made as sentence-transformers advises: MultipleNegativesRankingLoss
    with directions query_to_doc and doc_to_query, per_direction. A row's own negatives count for the anchor."""

    name: Literal["MultipleNegativesSymmetricRankingLoss"]


class CachedMultipleNegativesSymmetricRankingLossConfig(_Caching, _Ranking):
    """The same in mini-batches."""

    name: Literal["CachedMultipleNegativesSymmetricRankingLoss"]


class MegaBatchMarginLossConfig(_Caching, Loss):
    """Margins for the positive and for the hardest positive of another row: Wieting and Gimpel 2018 (ParaNMT), arXiv
    1711.05732. Wants large batches, of 500 rows or more."""

    name: Literal["MegaBatchMarginLoss"]
    positive_margin: float = Field(default=0.8, ge=-1.0, le=1.0)
    """The cosine to the positive shall be above it."""
    negative_margin: float = Field(default=0.3, ge=-1.0, le=1.0)
    """The cosine to the negative shall be below it."""
    use_mini_batched_version: bool = True
    """Gradient caching: less memory, each text embedded twice, the same gradients."""
    mini_batch_size: PositiveInt = 50
    """Texts embedded at a time, and rows compared at a time."""

    num_negatives: ClassVar[tuple[int, int | None]] = (0, 0)

    @property
    def is_cached(self) -> bool:
        return self.use_mini_batched_version


class GISTEmbedLossConfig(_Guided):
    """Cross-entropy among the candidates that a guide does not take for positives: Solatorio 2024, arXiv 2402.16829."""

    name: Literal["GISTEmbedLoss"]

    num_negatives: ClassVar[tuple[int, int | None]] = (0, 1)


class CachedGISTEmbedLossConfig(_Caching, _Guided):
    """The same in mini-batches, and with any number of negatives."""

    name: Literal["CachedGISTEmbedLoss"]


class AnglELossConfig(Loss):
    """Each anchor with its positive shall be closer in angle than any anchor of the batch with its own negative: Li and
    Li 2023, arXiv 2309.12871."""

    name: Literal["AnglELoss"]
    scale: PositiveFloat = 20.0
    """Similarities are multiplied by it; 1 / temperature."""

    num_negatives: ClassVar[tuple[int, int | None]] = (1, None)


GuidedLossConfig = GISTEmbedLossConfig | CachedGISTEmbedLossConfig

LossConfig = Annotated[
    TripletLossConfig
    | MultipleNegativesRankingLossConfig
    | CachedMultipleNegativesRankingLossConfig
    | MultipleNegativesSymmetricRankingLossConfig
    | CachedMultipleNegativesSymmetricRankingLossConfig
    | MegaBatchMarginLossConfig
    | GISTEmbedLossConfig
    | CachedGISTEmbedLossConfig
    | AnglELossConfig,
    Field(discriminator="name"),
]

LEFT_OUT: dict[str, str] = {
    "MatryoshkaLoss": "it wraps another loss: write a section `matryoshka` into that one",
    **dict.fromkeys(
        ("AdaptiveLayerLoss", "Matryoshka2dLoss"),
        "it trains lower layers too, for models that are cut; tercet measures and publishes whole models",
    ),
    # Beside another loss it would need that one's embeddings, which most keep to themselves, or a second forward pass;
    # and it sees one worker's rows only, so that the number of workers would change the result.
    "GlobalOrthogonalRegularizationLoss": "it spreads texts out without looking at positives: no loss by itself",
    **dict.fromkeys(
        ("ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives"), "it trains a copy of the model beside it"
    ),
    "DenoisingAutoEncoderLoss": "it trains a decoder beside the model",
    **dict.fromkeys(
        ("CoSENTLoss", "ContrastiveLoss", "CosineSimilarityLoss", "OnlineContrastiveLoss", "SoftmaxLoss"),
        "it needs a label for each row, which a dataset version does not have",
    ),
    **dict.fromkeys(
        (f"Batch{kind}TripletLoss" for kind in ("All", "Hard", "HardSoftMargin", "SemiHard")),
        "it needs texts sorted into classes, not pairs or triplets",
    ),
    **dict.fromkeys(
        ("DistillKLDivLoss", "EmbedDistillLoss", "MarginMSELoss", "MSELoss"),
        "it needs a teacher's scores or embeddings as labels",
    ),
}
"""The losses of sentence-transformers 6.2 that a recipe cannot name, and why."""
