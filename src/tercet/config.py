"""What a person wrote: a recipe, as frozen sections.

A recipe is YAML. All of its errors are reported at once, each with file:line:column and, for an unknown key, the
nearest known one. `--set section.key=value` changes a value from the command line and is checked the same way.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from tercet import recipe_yaml
from tercet.errors import ConfigError


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


class DatasetConfig(Section):
    """Which dataset version to train on."""

    name: str
    """The name given to `tercet shard --name`."""
    version: str = "latest"
    """A version id, or `latest`. The run is fixed to the version found at submission."""


class ModelConfig(Section):
    """The base model."""

    name_or_path: str
    """A hub name, a local folder, or `package:NAME` for a model that a Python package carries."""
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
    no_duplicates: bool = True
    """No text twice in one global batch: with in-batch negatives, a duplicate is a wrong negative."""
    max_train_rows: PositiveInt | None = None
    """Use only this many rows of the train split, chosen by the seed: for a short try."""
    log_every_steps: PositiveInt = 10


class EvaluationConfig(Section):
    """How a model is measured, and what best means."""

    metric: Literal["ndcg@10", "mrr@10", "triplet_accuracy"] = "ndcg@10"
    """Best checkpoint = the highest value on the eval split."""
    batch_size: PositiveInt = 64
    """Texts at a time, on each worker."""


class WorkersConfig(Section):
    """Where it runs. Nothing here changes the experiment, only its speed."""

    num_workers: PositiveInt = 1
    use_gpu: bool | Literal["auto"] = "auto"
    """`auto`: a GPU for each worker where the cluster has any."""
    cpus_per_worker: PositiveInt = 1
    max_failures: int = Field(default=3, ge=0)
    """How often Ray may restart the workers, from the newest complete checkpoint."""
    start_timeout_seconds: PositiveInt = 600
    """How long to wait for the cluster to have room for all workers."""
    cache_dir: str | None = None
    """Where a worker keeps shards; without it `TERCET_CACHE_DIR`, else `~/.cache/tercet`."""


class Config(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Names the model that comes out; letters, digits, dot, dash and underscore."""
    storage: StorageConfig = StorageConfig()
    dataset: DatasetConfig
    model: ModelConfig
    loss: LossConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()

    def experiment_hash(self) -> str:
        """Eight hex digits over what decides the result. Storage and workers are left out: a run that moves to more
        workers is the same run, and resumes."""
        content = self.model_dump(mode="json", exclude={"storage", "workers"})
        content["dataset"].pop("version")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe. `overrides` are `a.b=value`, the value in YAML.

    Raises ConfigError with every error of the file, each as file:line:column."""
    document, marks = recipe_yaml.load(path)
    for override in overrides:
        recipe_yaml.override(document, marks, override)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(error, marks, str(path))), hint="mend the recipe and try again") from None
    return _absolute(config)


def _absolute(config: Config) -> Config:
    """Ray's workers run in a folder of their own, so no relative path may leave this process."""
    storage, model = config.storage, config.model
    if "://" not in storage.uri:
        storage = storage.model_copy(update={"uri": str(Path(storage.uri).expanduser().absolute())})
    if (folder := Path(model.name_or_path).expanduser()).is_dir():
        model = model.model_copy(update={"name_or_path": str(folder.absolute())})
    return config.model_copy(update={"storage": storage, "model": model})


def _describe(error: ValidationError, marks: recipe_yaml.Marks, file: str) -> list[str]:
    lines = []
    # The discriminator adds the loss's own name to the location: it is not a key of the file.
    found = [(tuple(part for part in item["loc"] if part not in _LOSS_NAMES), item) for item in error.errors()]
    for loc, item in sorted(found, key=lambda pair: marks.position(pair[0])):
        where, dotted = marks.where(loc, file), ".".join(str(part) for part in loc)
        match item["type"]:
            case "extra_forbidden":
                keys = _keys_at(item["loc"][:-1])
                known = difflib.get_close_matches(str(loc[-1]), keys, n=1, cutoff=0.5)
                guess = f"; did you mean `{known[0]}`?" if known else f"; known here: {', '.join(keys)}"
                lines.append(f"{where}: unknown key `{dotted}`{guess}")
            case "missing":
                lines.append(f"{where}: `{dotted}` is missing")
            case "string_type" if isinstance(item["input"], int | float):
                lines.append(f"{where}: `{dotted}` is a text: write it in quotes, not as the number {item['input']!r}")
            case "union_tag_not_found":
                lines.append(f"{where}: `{dotted}.name` is missing (known: {', '.join(_LOSS_NAMES)})")
            case "union_tag_invalid":
                known = difflib.get_close_matches(str(item["ctx"]["tag"]), _LOSS_NAMES, n=1, cutoff=0.3)
                guess = f"; did you mean `{known[0]}`?" if known else ""
                where = marks.where((*loc, "name"), file)
                lines.append(f"{where}: unknown loss `{item['ctx']['tag']}`{guess} (known: {', '.join(_LOSS_NAMES)})")
            case _:
                value = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
                lines.append(f"{where}: `{dotted}`: {item['msg'][0].lower()}{item['msg'][1:]}{value}")
    return lines


_LOSSES: tuple[type[Section], ...] = get_args(get_args(LossConfig)[0])
_LOSS_NAMES: tuple[str, ...] = tuple(get_args(loss.model_fields["name"].annotation)[0] for loss in _LOSSES)


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section at `loc`, where a loss is named by its own name."""
    section: type[BaseModel] = Config
    for part in loc:
        if part == "loss":
            continue
        if part in _LOSS_NAMES:
            section = _LOSSES[_LOSS_NAMES.index(str(part))]
        elif part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return list(section.model_fields)
