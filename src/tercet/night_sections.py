"""More sections of a recipe: what happens around a run, and when its model takes the champion's place."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from tercet.sections import Section


class SliceConfig(Section):
    """Rows that are looked at by themselves, by a rule. All that is given must hold."""

    column: Literal["anchor", "positive"] = "anchor"
    matches: str | None = None
    """A regular expression that is found in the text."""
    min_chars: PositiveInt | None = None
    max_chars: PositiveInt | None = None

    @field_validator("matches")
    @classmethod
    def _is_a_pattern(cls, matches: str | None) -> str | None:
        try:
            re.compile(matches or "")
        except re.error as error:
            raise ValueError(f"{matches!r} is not a regular expression: {error}") from None
        return matches

    def holds(self, text: str) -> bool:
        """Whether a text is in the slice."""
        return (
            (self.matches is None or re.search(self.matches, text) is not None)
            and (self.min_chars is None or len(text) >= self.min_chars)
            and (self.max_chars is None or len(text) <= self.max_chars)
        )


class FrozenDatasetConfig(Section):
    """A dataset whose test split is measured on."""

    name: str
    version: str = "latest"


class GateConfig(Section):
    """When a candidate takes the champion's place. Metrics are shares of 1: 0.01 is one point. Nothing here changes the
    experiment; docs/decisions/0010-the-gate.md says what each error rate means."""

    alpha: float = Field(default=0.01, ge=0.001, le=0.2)
    """How often a candidate that is no better may pass for better by chance."""
    minimum_effect: NonNegativeFloat = 0.005
    """A smaller gain of `evaluation.metric` is not worth a new model, however sure it is."""
    guard_alpha: float = Field(default=0.05, ge=0.001, le=0.2)
    """How often a loss above its limit may pass for none, in the other metrics and out of domain. In slices, how often
    a candidate may be held back although no slice loses more than its limit."""
    max_loss: PositiveFloat = 0.02
    """In the other metrics. That it is no more must be shown."""
    max_loss_out_of_domain: PositiveFloat = 0.02
    """In data that the model is not trained for. That it is no more must be shown."""
    max_loss_in_slice: PositiveFloat = 0.05
    """A slice that is shown to lose more holds the candidate back."""
    min_groups: int = Field(default=50, ge=10)
    """Nothing is decided on fewer independent groups of rows, neither on the whole nor on a slice."""
    slices: dict[str, SliceConfig] = Field(default_factory=dict)
    """By name, beside those of the data's own label columns (`tercet shard --slice COLUMN`)."""
    out_of_domain: tuple[FrozenDatasetConfig, ...] = ()
    """Data that the model is not trained for, and must not forget."""
    num_resamples: int = Field(default=9_999, ge=999)
    """Random subsets of the groups that a p value is counted from."""
    seed: int = Field(default=0, ge=0)
    """Of these subsets."""


class MiningConfig(Section):
    """Which texts become hard negatives: the nearest to the anchor that are far enough from being right."""

    num_negatives: PositiveInt = 1
    relative_margin: float = Field(default=0.05, ge=0.0, lt=1.0)
    """A text whose similarity is above that of the positive less this share of it is taken for a right answer, and left
    out. 0.05 is the best of the ways that Moreira et al. 2024 compare (arXiv 2407.15831, TopK-PercPos at 95 %)."""
    max_score: float | None = None
    """And so is one with a similarity above this."""
    range_min: int = Field(default=0, ge=0)
    """So many of the nearest are passed over."""


class PublishConfig(Section):
    """Who is told of a new champion, after it serves. What cannot be told is tried again on the next night."""

    onnx: bool = False
    """Export it as one file, which counts only once its metrics on the test split are the model's."""
    webhook: str | None = None
    """A URL that gets a POST with JSON."""
    huggingface: str | None = None
    """A repository of the Hub, `owner/name`. The token comes from the environment (HF_TOKEN)."""
    mlflow: str | None = None
    """The URI of an MLflow server; a version of the registered model of the recipe's name gets the alias `champion`."""


class NightlyConfig(Section):
    """What `tercet nightly` does around a run. Nothing here changes the experiment."""

    sources: tuple[str, ...] = ()
    """Files, or patterns such as `s3://bucket/incoming/*.jsonl.gz`, whose rows are added to the dataset first. Files
    that were added before are not read again."""
    columns: dict[str, str] = Field(default_factory=lambda: {name: name for name in ("anchor", "positive", "negative")})
    """The sources' column names for them; without a negative, the rows are pairs."""
    group: str | None = None
    """The sources' column whose rows stay in one split."""
    slices: tuple[str, ...] = ()
    """The sources' columns of labels."""
    max_bad_rows: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of bad rows above which nothing is added, and the night ends."""
    begins_at_utc_hour: int = Field(default=12, ge=0, le=23)
    """When a new night begins, so that starts before and after midnight are of one. UTC knows no daylight saving."""
    mine: MiningConfig | None = None
    """Mine hard negatives before training: the run then trains on `<dataset>-mined`, which is made from the version."""
    publish: PublishConfig = PublishConfig()
    index_rows: PositiveInt | None = None
    """Rows of the index that serves, to tell how long embedding them again takes. Without it, the positives at hand."""
