"""Read and check a recipe.

A recipe is YAML. All of its errors are reported at once, each with file:line:column; for an unknown key, the nearest
known key is suggested. `--set section.key=value` on the command line replaces a value and is checked the same way.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from tercet.config import recipe_yaml
from tercet.config.experiment import experiment_hash
from tercet.config.losses import UNSUPPORTED_LOSSES, GuidedLossConfig, LossConfig
from tercet.config.sections import (
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    NightlyConfig,
    Section,
    StorageConfig,
    TrainingConfig,
    WorkersConfig,
)
from tercet.errors import ConfigError
from tercet.storage.base import expand_home


class Config(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the model that the recipe makes: letters, digits, dot, dash and underscore."""
    storage: StorageConfig = StorageConfig()
    dataset: DatasetConfig
    """Dataset to train on and to measure on: its eval and test splits decide whether the model is better."""
    mix: tuple[DatasetConfig, ...] = ()
    """More datasets to train on; only their train splits are used. Each batch comes from one dataset."""
    model: ModelConfig
    loss: LossConfig
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    nightly: NightlyConfig = NightlyConfig()
    workers: WorkersConfig = WorkersConfig()

    @field_validator("mix")
    @classmethod
    def _each_dataset_once(cls, mix: tuple[DatasetConfig, ...], info: ValidationInfo) -> tuple[DatasetConfig, ...]:
        names = [part.name for part in (*filter(None, [info.data.get("dataset")]), *mix)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} given twice; to use rows more often, raise the dataset's weight")
        return mix

    @model_validator(mode="after")
    def _replay_needs_versions_that_grow(self) -> Config:
        if self.dataset.replay is not None and self.nightly.mine is not None:
            raise ValueError("dataset.replay cannot be used with nightly.mine: all rows of a mined version are new")
        return self

    def experiment_hash(self) -> str:
        """Return eight hex digits over what decides the result (see experiment.py)."""
        return experiment_hash(self)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe.

    overrides: values to replace, each as `section.key=value` with the value in YAML.
    Raises ConfigError with every error, each with file:line:column or the override."""
    document, marks = recipe_yaml.load(path)
    for override in overrides:
        recipe_yaml.override(document, marks, override)
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(error, marks, str(path))), hint="fix the recipe and try again") from None
    return _absolute(config)


def _absolute(config: Config) -> Config:
    """Make local paths absolute: Ray's workers run in other folders than this process."""
    storage, model, loss = config.storage, config.model, config.loss
    if "://" not in storage.uri:
        storage = storage.model_copy(update={"uri": str(expand_home(storage.uri).absolute())})
    if (folder := expand_home(model.name_or_path)).is_dir():
        model = model.model_copy(update={"name_or_path": str(folder.absolute())})
    if isinstance(loss, GuidedLossConfig) and (folder := expand_home(loss.guide)).is_dir():
        loss = loss.model_copy(update={"guide": str(folder.absolute())})
    return config.model_copy(update={"storage": storage, "model": model, "loss": loss})


def _describe(error: ValidationError, marks: recipe_yaml.Marks, file: str) -> list[str]:
    lines = []
    # pydantic's discriminator adds the name of the loss to the location, where the file has no key.
    items = _one_for_each_union(error.errors())
    located = [(tuple(part for part in item["loc"] if part not in _LOSS_NAMES), item) for item in items]
    for loc, item in sorted(located, key=lambda pair: marks.position(pair[0])):
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
                lines.append(f"{where}: `{dotted}` must be a string: put {item['input']!r} in quotes")
            case "model_type" | "model_attributes_type":
                kind = type(item["input"]).__name__
                lines.append(f"{where}: `{dotted}` must be a section of keys and values, not of type {kind}")
            case "tuple_type":
                lines.append(f"{where}: `{dotted}` must be a list in brackets, [...], not {item['input']!r}")
            case "value_error":
                lines.append(f"{where}: " + (f"`{dotted}`: " if dotted else "") + str(item["ctx"]["error"]))
            case "union_tag_not_found":
                lines.append(f"{where}: `{dotted}.name` is missing (known: {', '.join(_LOSS_NAMES)})")
            case "union_tag_invalid":
                tag = str(item["ctx"]["tag"])
                known = difflib.get_close_matches(tag, _LOSS_NAMES, n=1, cutoff=0.3)
                problem = f"unknown loss `{tag}`" + (f"; did you mean `{known[0]}`?" if known else "")
                if tag in UNSUPPORTED_LOSSES:
                    problem = f"`{tag}` cannot be used: {UNSUPPORTED_LOSSES[tag]}"
                lines.append(f"{marks.where((*loc, 'name'), file)}: {problem} (known: {', '.join(_LOSS_NAMES)})")
            case _:
                value = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
                lines.append(f"{where}: `{dotted}`: {item['msg'][0].lower()}{item['msg'][1:]}{value}")
    return lines


# How pydantic names the member of a union to which an error belongs, after the key.
_MEMBER = re.compile(r"bool|int|float|str|constrained-\w+|(literal|tuple|list)\[.*\]")


def _one_for_each_union(items: Sequence[Any]) -> list[Any]:
    """Return pydantic's errors, with one in place of those of all members of a union, such as `bool | "auto"`."""
    groups: dict[tuple[int | str, ...], list[Any]] = {}
    for item in items:
        if item["loc"] and _MEMBER.fullmatch(str(item["loc"][-1])):
            groups.setdefault(item["loc"][:-1], []).append(item)
    unions = {loc: group for loc, group in groups.items() if len(group) > 1}
    found = [item for item in items if item["loc"][:-1] not in unions]
    for loc, group in unions.items():
        wanted = [
            "a list in brackets, [...]"
            if item["type"] == "tuple_type"
            else item["msg"].removeprefix("Input should be ").split(", unable to ")[0]
            for item in group
        ]
        found.append({**group[0], "loc": loc, "type": "union", "msg": f"Input should be {', or '.join(wanted)}"})
    return found


_LOSSES: tuple[type[Section], ...] = get_args(get_args(LossConfig)[0])
_LOSS_NAMES: tuple[str, ...] = tuple(get_args(loss.model_fields["name"].annotation)[0] for loss in _LOSSES)


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Return the known keys of the section at `loc`, in which the name of a loss follows `loss`."""
    section: type[BaseModel] = Config
    for part in loc:
        if part == "loss":
            continue
        if part in _LOSS_NAMES:
            section = _LOSSES[_LOSS_NAMES.index(str(part))]
        elif part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            for kind in get_args(annotation) or (annotation,):  # a section, or `Section | None`
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return list(section.model_fields)


def world_sizes(config: Config) -> tuple[int, ...]:
    """Return the numbers of workers that share the global batch evenly, ascending; empty if none does."""
    workers, training = config.workers, config.training
    allowed = range(workers.min or workers.num_workers, (workers.max or workers.num_workers) + 1)
    num_rows_to_share, rest = divmod(training.global_batch_size, training.num_micro_batches)
    return () if rest else tuple(size for size in allowed if num_rows_to_share % size == 0)


def on_world(config: Config, world_size: int) -> Config:
    """Return the recipe with exactly this many workers."""
    return config.model_copy(update={"workers": config.workers.model_copy(update={"num_workers": world_size})})


def rows_per_rank_and_micro_batch(config: Config) -> int:
    """Return the rows in one forward pass of one worker."""
    training = config.training
    return training.global_batch_size // (config.workers.num_workers * training.num_micro_batches)


def as_yaml(config: Config, exclude: set[str] | None = None) -> str:
    """Return the recipe as YAML with all defaults, without the sections named in `exclude`."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude=exclude), sort_keys=False, allow_unicode=True)
