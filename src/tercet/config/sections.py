"""The sections of a recipe, frozen: what a person may write, with its default and its meaning beside it."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """A part of a recipe: frozen, and without room for unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class StorageConfig(Section):
    """Where datasets, runs and models lie."""

    uri: str = "./tercet-store"
    """A local folder, or `s3://bucket/prefix`. Credentials come from the environment, never from a recipe."""
    endpoint_url: str | None = None
    """For an S3 server other than AWS; without it, `AWS_ENDPOINT_URL` counts."""


class ReplayConfig(Section):
    """Which rows of a version that grew are trained on: those that the champion has not seen, and a draw of others."""

    new_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Old rows are left out until the new ones are this share of what is trained on."""
    half_life_versions: PositiveFloat | None = None
    """Of old rows, those that came so many versions earlier are drawn half as often. Without it, all are alike."""


class DatasetConfig(Section):
    """A dataset version to train on."""

    name: str
    """The name given to `tercet shard --name`."""
    version: str = "latest"
    """A version id, or `latest`. The run is fixed to the version found at submission."""
    weight: PositiveFloat = 1.0
    """Passes over its train rows in an epoch: with 2 each row is in it twice, with 0.5 half of them are, and the other
    half in the next."""
    replay: ReplayConfig | None = None
    """Without it, every train row takes part. It needs a champion, whose data tells which rows are new; where there is
    none, and where no row is new, all take part as well."""


class PromptsConfig(Section):
    """What stands before a text, for models that were trained with it. Saved in the published model, which then puts
    them there by itself in `encode_query` and `encode_document`."""

    query: str = ""
    """Before an anchor."""
    document: str = ""
    """Before a positive and a negative."""


def role_of(column: str) -> Literal["query", "document"]:
    """Which of the two a text of this column is."""
    return "query" if column == "anchor" else "document"


class LoraConfig(Section):
    """Train small matrices beside frozen weights: Hu et al. 2021, arXiv 2106.09685. The published model is merged, and
    the adapter lies beside it."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get one, such as query and value."""


class ModelConfig(Section):
    """The base model."""

    name_or_path: str = Field(min_length=1)
    """A hub name, a local folder, or `package:NAME` for a model that a Python package carries."""
    start_from: Literal["base", "champion"] = "base"
    """Which weights the training starts from: these, or those of the champion, where there is one."""
    revision: str | None = None
    """The commit on the hub. Pin it: a branch moves under a nightly run."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of `model.safetensors`, checked before use."""
    trust_remote_code: bool = False
    """Run Python code from the model's own repository. Read that code at the pinned revision first."""
    max_seq_length: PositiveInt | None = None
    """Tokens; longer texts are cut. Without it, the model's own limit."""
    pooling: Literal["cls", "mean", "max", "lasttoken"] | None = None
    """Checked against the loaded model, so that a changed model on the hub cannot go unnoticed."""
    dense_features: PositiveInt | None = None
    """Width of the Dense layer after pooling; checked against the loaded model."""
    config_kwargs: dict[str, Any] = {}
    """Passed to the model's own configuration."""
    prompts: PromptsConfig | None = None
    """Without it, the model's own."""
    lora: LoraConfig | None = None
    """Without it, every weight is trained."""


class TrainingConfig(Section):
    """The experiment: everything here changes the final weights."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    num_epochs: PositiveInt = 1
    global_batch_size: PositiveInt = 32
    """Rows a step, over all workers and accumulation steps."""
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-5
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "fp32"
    """What the forward and backward pass compute in; the weights that are trained and saved are fp32 in any case. tf32
    and fp16 need a GPU, bf16 one that has it, or a CPU. `auto`: bf16 where the first worker finds it faster than fp32,
    in a second; the run then keeps to it on all machines."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    no_duplicates: bool = True
    """No text twice in one global batch: with in-batch negatives, a duplicate is a wrong negative. Where texts are
    in more rows than there are batches, up to 1 % of the rows repeat one, with a warning; above that, the run ends."""
    max_train_rows: PositiveInt | None = None
    """Use only this many rows of each dataset's train split, chosen by the seed: for a short try."""
    log_every_steps: PositiveInt = 10


class CheckpointConfig(Section):
    """What a crash costs, and what storage holds for it. Nothing here changes the experiment."""

    every_steps: PositiveInt | None = None
    """Between the ends of epochs, each of which has one. A crash costs the steps since the last."""
    keep_last: int = Field(default=2, ge=2)
    """So many of the newest stay in storage, and the best. Two, because the newest may turn out to be damaged."""
    lease_seconds: PositiveFloat = 60.0
    """How long an attempt that gives no sign of life keeps the run from another one."""


class EvaluationConfig(Section):
    """How a model is measured, and what best means."""

    metric: Literal["ndcg@10", "mrr@10", "triplet_accuracy"] = "ndcg@10"
    """Best checkpoint = the highest value on the eval split."""
    batch_size: PositiveInt = 64
    """Texts at a time, on each worker."""


Parallelism = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]


class WorkersConfig(Section):
    """Where it runs. Nothing here changes the experiment, only its speed and memory."""

    num_workers: PositiveInt = 1
    """So many, no fewer and no more; with `min` and `max`, what the plan's figures are for."""
    min: PositiveInt | None = None
    max: PositiveInt | None = None
    """Under Ray, as many from `min` to `max` as there is room for: a run goes on with fewer when machines are lost.
    Only numbers are taken that share the global batch evenly, so the batches stay what they are."""
    grow_check_seconds: PositiveFloat = 600.0
    """How often a run that could have more workers looks for room. To grow it starts again from the last checkpoint."""
    parallelism: Literal["auto"] | Parallelism = "auto"
    """How weights, gradients and optimizer state lie on the workers: whole on each (ddp), the optimizer state sharded
    (zero1), the gradients too (zero2), the weights too (zero3, fsdp2), and kept in host memory (zero3_offload). `auto`:
    the fastest that fits."""
    deepspeed: dict[str, Any] = {}
    """Laid over the DeepSpeed settings that tercet derives, by DeepSpeed's own names."""
    memory_gib_per_worker: PositiveFloat | None = None
    """Memory of one worker's GPU, for `parallelism: auto`. Without it, a CPU worker's share of this machine; for GPUs
    it is then unknown, and taken for enough."""
    packing: Literal["auto", "packed", "chunked", "plain"] = "auto"
    """How texts share a forward pass: all columns in one row without padding (packed), in a few padded batches of like
    lengths (chunked), or column by column, as sentence-transformers does it (plain). The loss is the same but for
    rounding, and for what dropout draws. `auto`: packed where the model allows it, else chunked."""
    use_gpu: bool | Literal["auto"] = "auto"
    """`auto`: a GPU for each worker where the cluster has any."""
    cpus_per_worker: PositiveInt = 1
    max_failures: int = Field(default=3, ge=0)
    """How often Ray may restart the workers, from the newest complete checkpoint."""
    max_preemptions: int = Field(default=100, ge=0)
    """How often machines may be taken away with notice. The run saves, loses no step and goes on elsewhere."""
    step_timeout_seconds: PositiveInt = 1800
    """How long a step, an evaluation or a checkpoint may take. A worker that hangs longer ends, with its stacks in the
    log, and counts as a failure."""
    start_timeout_seconds: PositiveInt = 600
    """How long to wait for the cluster to have room for all workers."""
    cache_dir: str | None = None
    """Where a worker keeps shards; without it `TERCET_CACHE_DIR`, else `~/.cache/tercet`."""

    @model_validator(mode="before")
    @classmethod
    def _plan_for_the_most(cls, values: Any) -> Any:
        if isinstance(values, dict) and "num_workers" not in values and values.get("max") is not None:
            return {**values, "num_workers": values["max"]}
        return values

    @model_validator(mode="after")
    def _check_range(self) -> WorkersConfig:
        if (self.min is None) != (self.max is None):
            raise ValueError("min and max go together")
        if self.min is not None and self.max is not None and not self.min <= self.num_workers <= self.max:
            raise ValueError(f"num_workers {self.num_workers} is not from min {self.min} to max {self.max}")
        return self


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
