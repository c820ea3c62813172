"""The sections of a recipe: every key that a user may write, with its default and its meaning."""

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
    """A part of a recipe. Frozen; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class StorageConfig(Section):
    """Where datasets, runs and models are stored."""

    uri: str = "./tercet-store"
    """A local folder, or `s3://bucket/prefix`. Credentials come from the environment, never from a recipe."""
    endpoint_url: str | None = None
    """For an S3 server other than AWS. Defaults to the environment variable `AWS_ENDPOINT_URL`."""


class ReplayConfig(Section):
    """Which rows of a grown version to train on: all that are new to the champion, and a random draw of old ones."""

    new_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of new rows among the rows to train on; the number of old rows follows from it."""
    half_life_versions: PositiveFloat | None = None
    """Old rows are drawn half as often for each this many versions of age. Without it, all are equally likely."""


class DatasetConfig(Section):
    """A dataset version to train on."""

    name: str
    """The name given to `tercet shard --name`."""
    version: str = "latest"
    """A version id, or `latest`. A run keeps the version that was the latest at its submission."""
    weight: PositiveFloat = 1.0
    """Passes over its train rows in an epoch. With 2, an epoch has each row twice; with 0.5, it has half of the rows,
    and the next epoch has the other half."""
    replay: ReplayConfig | None = None
    """Train on all new rows and some old ones. Every train row is used without this section, without a champion (its
    data decides which rows are new), and if no row is new."""


class PromptsConfig(Section):
    """Text to put before each query or document, for models that were trained so. Saved in the published model, whose
    `encode_query` and `encode_document` then add it."""

    query: str = ""
    """Put before an anchor."""
    document: str = ""
    """Put before positives and negatives."""


def role_of(column: str) -> Literal["query", "document"]:
    """Return whether texts of this column are queries or documents."""
    return "query" if column == "anchor" else "document"


class LoraConfig(Section):
    """Train small matrices beside frozen weights: Hu et al. 2021, arXiv 2106.09685. The published model has the adapter
    merged into its weights; the adapter is also stored separately."""

    rank: PositiveInt = 16
    """Rank of the update: the inner width of the two matrices of an adapter."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the input of an adapter."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers to adapt, such as query and value."""


class ModelConfig(Section):
    """The base model."""

    name_or_path: str = Field(min_length=1)
    """A hub name, a local folder, or `package:NAME` for a model inside an installed Python package."""
    start_from: Literal["base", "champion"] = "base"
    """Weights that the training starts from: this base model, or the champion if there is one."""
    revision: str | None = None
    """Commit on the hub. Pin it: a branch may move between nightly runs."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of `model.safetensors`, checked before use."""
    trust_remote_code: bool = False
    """Run Python code from the model's own repository. Read that code at the pinned revision first."""
    max_seq_length: PositiveInt | None = None
    """Limit in tokens; longer texts are cut. Defaults to the model's own limit."""
    pooling: Literal["cls", "mean", "max", "lasttoken"] | None = None
    """Expected pooling. A loaded model with another one is refused, so that a change on the hub is noticed."""
    dense_features: PositiveInt | None = None
    """Expected width of the Dense layer after pooling; a loaded model with another one is refused."""
    config_kwargs: dict[str, Any] = {}
    """Passed to the model's own configuration."""
    prompts: PromptsConfig | None = None
    """Defaults to the model's own prompts."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter. Without this section, every weight is trained."""


class TrainingConfig(Section):
    """The experiment: everything here changes the final weights."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of every random choice of the training."""
    num_epochs: PositiveInt = 1
    """Passes over the train rows."""
    global_batch_size: PositiveInt = 32
    """Rows per optimizer step, over all workers and accumulation steps."""
    gradient_accumulation_steps: PositiveInt | Literal["auto"] = 1
    """Micro-batches per optimizer step, on each worker. `auto`: 1, or as many as it takes for the longest micro-batch
    of the run to fit into a GPU; tried before the first step, and kept by the run. Not for losses that compare the rows
    of a batch with each other: their value depends on the size of micro-batches."""
    learning_rate: PositiveFloat = 2e-5
    """Highest learning rate of AdamW."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate changes during the training, as in transformers."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients with a larger norm are scaled down to it; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] | None = None
    """Number format of the forward and backward pass; the trained and saved weights are always fp32. tf32 and fp16 need
    a GPU; bf16 needs a CPU, or a GPU that supports it. Not set: on a CPU fp32; on a GPU bf16, else tf32, whichever it
    has first. `auto`: the first worker tries for a second whether another one is faster than fp32. Either way the
    choice is made when the run begins, and the run keeps it on all machines."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third more time."""
    no_duplicates: bool = True
    """Keep every text from appearing twice in a global batch: with in-batch negatives, a duplicate is a wrong negative.
    If a text is in more rows than there are batches, up to 1 % of all rows may repeat a text, with a warning; above
    that, the run fails."""
    last_batch: Literal["drop", "keep"] = "drop"
    """What becomes of the rows of a pass that do not fill a last global batch. `drop`: that pass does without them.
    `keep`: they are a smaller batch, as with the plain trainer."""
    max_train_rows: PositiveInt | None = None
    """Use only this many rows of each dataset's train split, chosen by the seed: for a quick trial."""
    deterministic: bool = False
    """On a GPU, compute the same bits again from the same data, on the same kind and number of GPUs, as a CPU does
    anyway. Slower, and an operation for which torch has no such way ends the run."""
    log_every_steps: PositiveInt = 10
    """Steps between two entries of the training log."""

    @property
    def computed_precision(self) -> str:
        """The precision of a run that has begun: one without a choice began on a CPU, in fp32."""
        return self.precision or "fp32"

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per optimizer step, on each worker; with `auto`, the 1 that a run begins with."""
        return 1 if self.gradient_accumulation_steps == "auto" else self.gradient_accumulation_steps


class CheckpointConfig(Section):
    """How much work a crash can cost, and what storage keeps. Nothing here changes the experiment."""

    every_steps: PositiveInt | None = None
    """Also write a checkpoint every this many steps, beside the one at the end of each epoch. A crash costs the steps
    since the last checkpoint."""
    keep_last: int = Field(default=2, ge=2)
    """Keep this many of the newest checkpoints, and the best. At least two: the newest may turn out to be damaged."""
    lease_seconds: PositiveFloat = 60.0
    """An attempt that shows no sign of life for this long loses the run to the next attempt."""


class EvaluationConfig(Section):
    """How a model is measured, and which checkpoint is the best."""

    metric: Literal["ndcg@10", "mrr@10", "triplet_accuracy"] = "ndcg@10"
    """The best checkpoint has the highest value of this metric on the eval split."""
    batch_size: PositiveInt = 64
    """Texts to embed at a time on a CPU, on each worker. A GPU gets batches of tokens: at most as many as this many
    texts of the greatest length have, and at most 32,768."""


Parallelism = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]


class WorkersConfig(Section):
    """Where the training runs. Nothing here changes the experiment, only its speed and memory."""

    num_workers: PositiveInt = 1
    """Exactly this many workers. With `min` and `max`, the number that the plan's estimates are for."""
    min: PositiveInt | None = None
    """Fewest workers that the run may continue with. Needs `max`."""
    max: PositiveInt | None = None
    """Under Ray, as many workers from `min` to `max` as there is room for: a run continues with fewer when machines are
    lost. Only numbers that share the global batch evenly are used, so the batches stay the same."""
    grow_check_seconds: PositiveFloat = 600.0
    """How often a run with fewer than `max` workers looks for room. To grow, it restarts from the last checkpoint."""
    parallelism: Literal["auto"] | Parallelism = "auto"
    """How weights, gradients and optimizer state are spread over the workers: each has all of them (ddp); the optimizer
    state is sharded (zero1), the gradients too (zero2), the weights too (zero3, fsdp2); or they are sharded and kept in
    host memory (zero3_offload). `auto`: the fastest that fits."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed settings, by DeepSpeed's own names; they override those that tercet derives."""
    memory_gib_per_worker: PositiveFloat | None = None
    """Memory of one worker, or of its GPU, for `parallelism: auto`. Defaults to a CPU worker's share of this machine,
    or to the memory of its smallest GPU; where neither is known, it is assumed to be enough."""
    packing: Literal["auto", "packed", "chunked", "plain"] = "auto"
    """How texts share a forward pass: all columns in one row without padding (packed), in a few padded batches of
    similar lengths (chunked), or column by column, as in sentence-transformers (plain). The loss is the same except for
    rounding and for the random numbers of dropout. `auto`: packed if a trial shows that the model allows it, else
    chunked. `packed`: an error where the trial refuses."""
    try_longest_batch: bool | Literal["auto"] = "auto"
    """Try the longest micro-batch of the run before its first step, so that memory is known to be enough; then put
    everything back. `auto`: on GPUs. A run that resumes tries again only with another number of workers."""
    use_gpu: bool | Literal["auto"] = "auto"
    """`auto`: a GPU for each worker if the cluster has enough or its autoscaler can start enough, else CPUs; the choice
    is printed with its reason. true: a GPU for each worker, or an error."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores that Ray reserves for each worker, and threads with which it computes."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray may restart the workers after a failure, from the newest complete checkpoint."""
    max_preemptions: int = Field(default=100, ge=0)
    """How often machines may be taken away with notice. The run saves, loses no step and continues elsewhere."""
    step_timeout_seconds: PositiveInt = 1800
    """How long a step, an evaluation or a checkpoint may take. A worker that takes longer is ended, which counts as a
    failure; the stacks of its threads are logged."""
    start_timeout_seconds: PositiveInt = 600
    """How long to wait for the cluster to have room for all workers."""
    cache_dir: str | None = None
    """Where a worker keeps shards and token ids. Defaults to the environment variable `TERCET_CACHE_DIR`, else
    `~/.cache/tercet`."""
    token_cache: bool | Literal["auto"] = "auto"
    """Whether a worker keeps the token ids of the train rows, so that they are computed once for all epochs and runs.
    `auto`: on a GPU, which would wait for the tokenizer; on a CPU, only those that the cache has already are used."""

    @model_validator(mode="before")
    @classmethod
    def _plan_for_the_most(cls, values: Any) -> Any:
        if isinstance(values, dict) and "num_workers" not in values and values.get("max") is not None:
            return {**values, "num_workers": values["max"]}
        return values

    @model_validator(mode="after")
    def _check_range(self) -> WorkersConfig:
        if (self.min is None) != (self.max is None):
            raise ValueError("give both min and max, or neither")
        if self.min is not None and self.max is not None and not self.min <= self.num_workers <= self.max:
            raise ValueError(f"num_workers {self.num_workers} is not between min {self.min} and max {self.max}")
        return self


class SliceConfig(Section):
    """A rule that selects rows to be judged separately. A row must meet all conditions that are given."""

    column: Literal["anchor", "positive"] = "anchor"
    """Column whose texts are tested."""
    matches: str | None = None
    """A regular expression to search for in the text."""
    min_chars: PositiveInt | None = None
    """Least length of the text, in characters."""
    max_chars: PositiveInt | None = None
    """Greatest length of the text, in characters."""

    @field_validator("matches")
    @classmethod
    def _is_a_pattern(cls, matches: str | None) -> str | None:
        try:
            re.compile(matches or "")
        except re.error as error:
            raise ValueError(f"{matches!r} is not a regular expression: {error}") from None
        return matches

    def holds(self, text: str) -> bool:
        """Return whether a text is in the slice."""
        return (
            (self.matches is None or re.search(self.matches, text) is not None)
            and (self.min_chars is None or len(text) >= self.min_chars)
            and (self.max_chars is None or len(text) <= self.max_chars)
        )


class FrozenDatasetConfig(Section):
    """A dataset of which only the test split is used, to measure on."""

    name: str
    """The name given to `tercet shard --name`."""
    version: str = "latest"
    """A version id, or `latest`."""


class GateConfig(Section):
    """When a candidate replaces the champion. Metrics are between 0 and 1: 0.01 is one point. Nothing here changes the
    experiment. docs/decisions/0010-the-gate.md explains each error rate."""

    alpha: float = Field(default=0.01, ge=0.001, le=0.2)
    """How often a candidate that is not better may be judged better by chance."""
    minimum_effect: NonNegativeFloat = 0.005
    """A smaller gain of `evaluation.metric` is not worth a new model, however certain it is."""
    guard_alpha: float = Field(default=0.05, ge=0.001, le=0.2)
    """How often a loss above its limit may go unnoticed, in the other metrics and out of domain. For slices, how often
    a candidate may be rejected although no slice loses more than its limit."""
    max_loss: PositiveFloat = 0.02
    """Limit for the other metrics. The candidate must be shown to lose less."""
    max_loss_out_of_domain: PositiveFloat = 0.02
    """Limit for data that the model is not trained for. The candidate must be shown to lose less."""
    max_loss_in_slice: PositiveFloat = 0.05
    """Limit for each slice. A candidate that is shown to lose more in any slice is rejected."""
    min_groups: int = Field(default=50, ge=10)
    """Least number of independent groups of rows for a decision, in the whole test split as in a slice."""
    slices: dict[str, SliceConfig] = Field(default_factory=dict)
    """More slices by name, beside those of the data's own label columns (`tercet shard --slice COLUMN`)."""
    out_of_domain: tuple[FrozenDatasetConfig, ...] = ()
    """Data that the model is not trained for and must not get worse on."""
    num_resamples: int = Field(default=9_999, ge=999)
    """Random resamples of the groups from which a p value is computed."""
    seed: int = Field(default=0, ge=0)
    """Seed of these resamples."""


class MiningConfig(Section):
    """Which texts become hard negatives: the most similar to the anchor that are unlikely to be right answers."""

    num_negatives: PositiveInt = 1
    """Hard negatives for each row."""
    relative_margin: float = Field(default=0.05, ge=0.0, lt=1.0)
    """A text with a similarity above (1 - relative_margin) times that of the positive is assumed to be a right answer,
    and excluded. 0.05 is the best of the methods that Moreira et al. 2024 compare (arXiv 2407.15831, TopK-PercPos at
    95 %)."""
    max_score: float | None = None
    """Also exclude candidates more similar than this."""
    range_min: int = Field(default=0, ge=0)
    """Skip this many of the most similar candidates."""


class PublishConfig(Section):
    """Where to announce a new champion after it serves. A failed announcement is retried on the next night."""

    onnx: bool = False
    """Export it as one ONNX file, which is valid only if it reaches the model's metrics on the test split."""
    webhook: str | None = None
    """A URL that gets a POST with JSON."""
    huggingface: str | None = None
    """A repository on the Hugging Face Hub, `owner/name`. The token comes from the environment (HF_TOKEN)."""
    mlflow: str | None = None
    """The URI of an MLflow server. The recipe's name is the registered model; its new version gets the alias
    `champion`."""


class NightlyConfig(Section):
    """What `tercet nightly` does around a run. Nothing here changes the experiment."""

    sources: tuple[str, ...] = ()
    """Files, or patterns such as `s3://bucket/incoming/*.jsonl.gz`, whose rows are first added to the dataset. Files
    that were added before are skipped."""
    columns: dict[str, str] = Field(default_factory=lambda: {name: name for name in ("anchor", "positive", "negative")})
    """Name of each column in the sources. Without a negative, the rows are pairs."""
    group: str | None = None
    """Column of the sources: rows with the same value stay in one split."""
    slices: tuple[str, ...] = ()
    """Columns of the sources that hold labels, by which results are split."""
    max_bad_rows: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of bad rows above which nothing is added and the night fails."""
    begins_at_utc_hour: int = Field(default=12, ge=0, le=23)
    """Hour at which a new night begins; starts before and after midnight then belong to the same night. UTC has no
    daylight saving time."""
    mine: MiningConfig | None = None
    """Mine hard negatives before training. The run then trains on `<dataset>-mined`, made from the dataset version."""
    publish: PublishConfig = PublishConfig()
    """Where to announce a new champion."""
    index_rows: PositiveInt | None = None
    """Rows of the index in production, to estimate how long embedding them again takes. Defaults to the number of texts
    in the evaluation's corpus."""
