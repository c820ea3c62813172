"""The losses of a recipe, by their names in sentence-transformers, with their parameters checked.

Parameters have the names and defaults of sentence-transformers 6.2. The exception is `gather_across_devices`, which is
on by default, so that the number of workers does not change the loss. AnglELoss and MegaBatchMarginLoss cannot gather:
they compare the rows of one worker's micro-batch only.
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
    """Train the first components of an embedding to be useful on their own: Kusupati et al. 2022, arXiv 2205.13147.

    The loss is the sum over embeddings cut to each of `dims` and scaled to length 1. A margin of TripletLoss is then
    between points on the unit sphere, which are at most 2 apart (euclidean)."""

    dims: tuple[PositiveInt, ...] = Field(min_length=1)
    """Widths. Include the model's own, or the whole embedding is not trained."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Weights of the loss at each of `dims`. Default: 1 each."""
    dims_per_step: PositiveInt | None = None
    """Use only this many of `dims` in each step, drawn at random. Default: all."""

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
        if value is None or not num_dims:  # dims are missing or wrong, which is reported already
            return value
        if info.field_name == "weights" and len(value) != num_dims:
            raise ValueError(f"needs one weight for each of the {num_dims} dims, not {len(value)}")
        if info.field_name == "dims_per_step" and value > num_dims:
            raise ValueError(f"must be at most {num_dims}, the number of dims, not {value}")
        return value


class Loss(Section):
    """Parameters and properties that every loss has."""

    name: str
    matryoshka: MatryoshkaConfig | None = None
    """Also train embeddings that are cut to fewer components. Without this section, only whole embeddings."""

    num_negatives: ClassVar[tuple[int, int | None]] = (0, None)
    """Least and greatest number of negatives per row that the loss works with; None: no limit."""

    @property
    def is_cached(self) -> bool:
        """Whether the loss uses gradient caching (Gao et al. 2021, arXiv 2101.06983): it embeds each text twice, and a
        hook on the loss runs a backward pass for each mini-batch."""
        return False

    @property
    def compares_rows(self) -> bool:
        """Whether a row's loss depends on the other rows of its micro-batch, such as by in-batch negatives."""
        return True

    @property
    def crosses_ranks(self) -> bool:
        """Whether the loss gathers the embeddings of all workers, which must then have equal numbers of rows."""
        return bool(getattr(self, "gather_across_devices", False))

    def column_problem(self, columns: tuple[str, ...]) -> tuple[str, str] | None:
        """Return why the loss does not work with these text columns, and what to do; None if it works.

        Columns are `anchor`, `positive`, and `negative` or `negative_1`, `negative_2`, ..."""
        num_negatives = sum(_NEGATIVE.fullmatch(column) is not None for column in columns)
        least, most = self.num_negatives
        if num_negatives < least:
            return "needs a column `negative`", "shard the data with --negative, or choose one that works on pairs"
        if most is None or num_negatives <= most:
            return None
        others = "choose MultipleNegativesRankingLoss or CachedGISTEmbedLoss"
        if most == 0:
            return "uses only other rows' positives as negatives", f"shard the data without --negative, or {others}"
        return "works with one negative per row", f"shard the data with one --negative, or {others}"


class _Caching(Section):
    mini_batch_size: PositiveInt = 32
    """Texts to embed at a time: this determines the memory of activations, not the batch size."""
    mini_batch_num_tokens: PositiveInt | None = None
    """Fill mini-batches up to this many tokens instead."""

    @property
    def is_cached(self) -> bool:
        return True


class _Ranking(Loss):
    scale: PositiveFloat = 20.0
    """Factor of the similarities; 1 / temperature."""
    similarity_fct: Similarity = "cos_sim"
    """With dot_score, use a scale of 1."""
    gather_across_devices: bool = True
    """Use negatives from the whole global batch, so that the number of workers does not change the loss."""


class _Directions(_Ranking):
    directions: tuple[Direction, ...] = ("query_to_doc",)
    """Which texts are compared: a query with all documents or with the other queries; a document with all queries or
    with the documents of other rows. Li et al. 2023 (GTE), arXiv 2308.03281, use all four."""
    partition_mode: Literal["joint", "per_direction"] = "joint"
    """One softmax over all directions, or the mean of one softmax per direction."""
    hardness_mode: Literal["in_batch_negatives", "hard_negatives", "all_negatives"] | None = None
    """Which negatives weigh more, the more similar they are: other rows' (Lan et al. 2025, arXiv 2503.04812), the row's
    own (Schechter Vera et al. 2025, arXiv 2509.20354), or both."""
    hardness_strength: float = Field(default=0.0, ge=0.0)
    """Multiplied by the similarity and added to a negative's logit. The two papers use 9 and 5."""

    @field_validator("directions")
    @classmethod
    def _has_the_positive(cls, directions: tuple[str, ...]) -> tuple[str, ...]:
        if "query_to_doc" not in directions:
            raise ValueError("must include query_to_doc: no other direction has the positive")
        if len(set(directions)) < len(directions):
            raise ValueError("must name each direction at most once")
        return directions

    @field_validator("partition_mode")
    @classmethod
    def _each_has_the_positive(cls, partition_mode: str, info: ValidationInfo) -> str:
        without = {"query_to_query", "doc_to_doc"} & set(info.data.get("directions", ()))
        if partition_mode == "per_direction" and without:
            raise ValueError(f"must be joint with {' and '.join(sorted(without))}, where the positive is missing")
        return partition_mode

    @field_validator("hardness_strength")
    @classmethod
    def _both_or_none(cls, strength: float, info: ValidationInfo) -> float:
        if "hardness_mode" in info.data and (info.data["hardness_mode"] is None) != (strength == 0.0):
            mode = info.data["hardness_mode"]
            raise ValueError("has no effect without hardness_mode" if mode is None else f"must be above 0 with {mode}")
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
    """A trained model that recognizes false negatives: a hub name, a local folder, or `package:NAME`. Not trained."""
    guide_revision: str | None = None
    """Commit on the hub. Pin it: a branch may move between nightly runs."""
    temperature: PositiveFloat = 0.01
    """Divisor of the cosine similarities."""
    margin_strategy: Literal["absolute", "relative"] = "absolute"
    """Exclude a negative if its similarity for the guide is above positive - margin (absolute), or above
    positive * (1 - margin) (relative)."""
    margin: float = 0.0
    """Margin of `margin_strategy`."""
    contrast_anchors: bool = True
    """Use other anchors as negatives too; only those of the same worker, even if positives are gathered."""
    contrast_positives: bool = True
    """Use other positives as negatives of the positive too."""
    gather_across_devices: bool = True
    """Use positives and negatives from the whole global batch."""


class TripletLossConfig(Loss):
    """`max(d(a, p) - d(a, n) + margin, 0)`: Hermans et al. 2017, arXiv 1703.07737."""

    name: Literal["TripletLoss"]
    distance_metric: Literal["euclidean", "cosine", "manhattan"] = "euclidean"
    """The distance d."""
    triplet_margin: PositiveFloat = 5.0
    """The margin."""

    num_negatives: ClassVar[tuple[int, int | None]] = (1, 1)

    @property
    def compares_rows(self) -> bool:
        return False


class MultipleNegativesRankingLossConfig(_Directions):
    """Cross-entropy of the positive among all candidates of the batch: Henderson et al. 2017, arXiv 1705.00652."""

    name: Literal["MultipleNegativesRankingLoss"]


class CachedMultipleNegativesRankingLossConfig(_Caching, _Directions):
    """MultipleNegativesRankingLoss in mini-batches, for batches that do not fit into memory: Gao et al. 2021, arXiv
    2101.06983."""

    name: Literal["CachedMultipleNegativesRankingLoss"]


class MultipleNegativesSymmetricRankingLossConfig(_Ranking):
    """MultipleNegativesRankingLoss in both directions: the positive must also find its anchor. Built as
    sentence-transformers advises, with directions query_to_doc and doc_to_query, per_direction. A row's own negatives
    are used for the anchor only."""

    name: Literal["MultipleNegativesSymmetricRankingLoss"]


class CachedMultipleNegativesSymmetricRankingLossConfig(_Caching, _Ranking):
    """MultipleNegativesSymmetricRankingLoss in mini-batches, for batches that do not fit into memory."""

    name: Literal["CachedMultipleNegativesSymmetricRankingLoss"]


class MegaBatchMarginLossConfig(_Caching, Loss):
    """Margins for the positive and for the most similar positive of another row: Wieting and Gimpel 2018 (ParaNMT),
    arXiv 1711.05732. Needs large batches, of 500 rows or more."""

    name: Literal["MegaBatchMarginLoss"]
    positive_margin: float = Field(default=0.8, ge=-1.0, le=1.0)
    """The cosine similarity to the positive should be above this."""
    negative_margin: float = Field(default=0.3, ge=-1.0, le=1.0)
    """The cosine similarity to the negative should be below this."""
    use_mini_batched_version: bool = True
    """Gradient caching: less memory and the same gradients, but each text is embedded twice."""
    mini_batch_size: PositiveInt = 50
    """Texts to embed at a time, and rows to compare at a time."""

    num_negatives: ClassVar[tuple[int, int | None]] = (0, 0)

    @property
    def is_cached(self) -> bool:
        return self.use_mini_batched_version


class GISTEmbedLossConfig(_Guided):
    """Cross-entropy of the positive among the candidates that a guide model considers negatives: Solatorio 2024, arXiv
    2402.16829."""

    name: Literal["GISTEmbedLoss"]

    num_negatives: ClassVar[tuple[int, int | None]] = (0, 1)


class CachedGISTEmbedLossConfig(_Caching, _Guided):
    """GISTEmbedLoss in mini-batches, and with any number of negatives."""

    name: Literal["CachedGISTEmbedLoss"]


class AnglELossConfig(Loss):
    """Each anchor should be closer in angle to its positive than any anchor of the batch to its own negative: Li and Li
    2023, arXiv 2309.12871."""

    name: Literal["AnglELoss"]
    scale: PositiveFloat = 20.0
    """Factor of the similarities; 1 / temperature."""

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

UNSUPPORTED_LOSSES: dict[str, str] = {
    "MatryoshkaLoss": "it wraps another loss: add a section `matryoshka` to that loss",
    **dict.fromkeys(
        ("AdaptiveLayerLoss", "Matryoshka2dLoss"),
        "it also trains models cut after a lower layer; tercet measures and publishes whole models only",
    ),
    # Added to another loss, it would need that loss's embeddings, which most losses do not return, or a second forward
    # pass. It also sees one worker's rows only, so that the number of workers would change the result.
    "GlobalOrthogonalRegularizationLoss": "it spreads texts out and ignores positives: it needs another loss beside it",
    **dict.fromkeys(
        ("ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives"), "it trains a second copy of the model"
    ),
    "DenoisingAutoEncoderLoss": "it trains a decoder beside the model",
    **dict.fromkeys(
        ("CoSENTLoss", "ContrastiveLoss", "CosineSimilarityLoss", "OnlineContrastiveLoss", "SoftmaxLoss"),
        "it needs a label for each row, which a dataset version does not have",
    ),
    **dict.fromkeys(
        (f"Batch{kind}TripletLoss" for kind in ("All", "Hard", "HardSoftMargin", "SemiHard")),
        "it needs texts labelled by class, not pairs or triplets",
    ),
    **dict.fromkeys(
        ("DistillKLDivLoss", "EmbedDistillLoss", "MarginMSELoss", "MSELoss"),
        "it needs a teacher's scores or embeddings as labels",
    ),
}
"""The losses of sentence-transformers 6.2 that a recipe cannot use, and why."""
