"""The experiment of a recipe: the values that decide its result, and their hash, which is part of every run id.

A run under way is found by this hash, so an update of tercet must not change it. Fields that tercet had when run ids
became stable are hashed always, as listed here. A field that was added later is hashed only if its value differs from
its default: recipes that do not mention it keep their hash. Never change the default of such a field.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from tercet.config.losses import Loss

NON_EXPERIMENT_SECTIONS = ("storage", "workers", "checkpoint", "gate", "nightly")
"""Sections that say where and how a run happens, and what becomes of its model."""

# A run that moves to more workers is the same run, and resumes. The dataset versions are in the run id themselves.
_NEVER_HASHED = {*NON_EXPERIMENT_SECTIONS, "dataset.version", "mix.version"}

_RANKING = "name matryoshka scale similarity_fct gather_across_devices"
_DIRECTIONS = f"{_RANKING} directions partition_mode hardness_mode hardness_strength"
_MINI_BATCHES = "mini_batch_size mini_batch_num_tokens"
_GUIDED = (
    "name matryoshka guide guide_revision temperature margin_strategy margin contrast_anchors contrast_positives "
    "gather_across_devices"
)
_LOSSES = {
    "TripletLoss": "name matryoshka distance_metric triplet_margin",
    "MultipleNegativesRankingLoss": _DIRECTIONS,
    "CachedMultipleNegativesRankingLoss": f"{_DIRECTIONS} {_MINI_BATCHES}",
    "MultipleNegativesSymmetricRankingLoss": _RANKING,
    "CachedMultipleNegativesSymmetricRankingLoss": f"{_RANKING} {_MINI_BATCHES}",
    "MegaBatchMarginLoss": f"name matryoshka {_MINI_BATCHES} positive_margin negative_margin use_mini_batched_version",
    "GISTEmbedLoss": _GUIDED,
    "CachedGISTEmbedLoss": f"{_GUIDED} {_MINI_BATCHES}",
    "AnglELoss": "name matryoshka scale",
}

_ALWAYS_HASHED: dict[str, str] = {
    "": "name dataset model loss training evaluation",
    "dataset": "name",
    "dataset.replay": "new_share half_life_versions",
    "mix": "name weight",
    "mix.replay": "new_share half_life_versions",
    "model": (
        "name_or_path revision sha256 trust_remote_code max_seq_length pooling dense_features config_kwargs prompts "
        "lora"
    ),
    "model.prompts": "query document",
    "model.lora": "rank alpha dropout target_modules",
    "training": (
        "seed num_epochs global_batch_size gradient_accumulation_steps learning_rate lr_scheduler warmup_ratio "
        "weight_decay max_grad_norm precision gradient_checkpointing no_duplicates max_train_rows log_every_steps"
    ),
    "evaluation": "metric batch_size",
    **{f"loss.{name}": fields for name, fields in _LOSSES.items()},
    **{f"loss.{name}.matryoshka": "dims weights dims_per_step" for name in _LOSSES},
}
"""Path of a section → its fields that are hashed at their default too. Frozen: never add a later field here."""


_UNSET = {"training.precision": "fp32"}
"""Path of a field → the default that it once had. Not set, it is hashed as that: recipes without it keep their hash."""


def experiment_hash(recipe: BaseModel) -> str:
    """Return eight hex digits over what decides a recipe's result."""
    return hashlib.sha256(json.dumps(_values(recipe, ""), sort_keys=True).encode()).hexdigest()[:8]


def _values(section: BaseModel, path: str) -> dict[str, Any]:
    """Values of the section at `path` that are hashed, as JSON."""
    always, dumped = _ALWAYS_HASHED.get(path, "").split(), section.model_dump(mode="json")
    values = {}
    for name, field in type(section).model_fields.items():
        value, field_path = getattr(section, name), f"{path}.{name}".lstrip(".")
        is_default = value == field.get_default(call_default_factory=True)
        if field_path not in _NEVER_HASHED and (name in always or not is_default):
            values[name] = _value(value, field_path, dumped[name])
            if value is None and field_path in _UNSET:
                values[name] = _UNSET[field_path]
    return values


def _value(value: Any, path: str, dumped: Any) -> Any:
    """A value as JSON; below sections, only what is hashed. dumped: all of it as JSON."""
    if isinstance(value, tuple):
        return [_value(item, path, dumped_item) for item, dumped_item in zip(value, dumped, strict=True)]
    if isinstance(value, Loss):
        return _values(value, f"{path}.{value.name}")
    return _values(value, path) if isinstance(value, BaseModel) else dumped
