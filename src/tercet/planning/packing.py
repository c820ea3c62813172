"""Choose how texts share a forward pass, from the model's files: in one packed row, in padded chunks, or not at all.

In one row of real tokens, linear layers, norms and activations need no padding; only attention needs to know where each
text begins (model/packed_attention.py, model/grouped_attention.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tercet.config.losses import GuidedLossConfig
from tercet.config.recipe import Config
from tercet.config.sections import ModelConfig
from tercet.planning.model_files import locate, reading

Packing = Literal["packed", "chunked", "plain"]

Attention = Literal["matrices", "bounds", "fused"]
"""The kernel for rows of texts: matrices over groups of texts; torch's `varlen_attn`, which knows the bounds of texts
but no dropout; or torch's kernels with bounds, dropout and 32 bits."""

# The model types of transformers 5.23 whose forward pass accepts a row of many texts; each is tested.
PACKED_MODEL_TYPES = ("bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
# Modules that process each text, or each token, independently.
TEXT_BY_TEXT = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LayerNorm")
PACKED_POOLING = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens")

# More padded chunks need less padding, but each is a forward pass. Four were faster than two; more were not tried.
NUM_CHUNKS = 4


class Facts(NamedTuple):
    """Facts about a model and its loss that determine how texts can share a forward pass."""

    model_type: str | None
    """`model_type` of config.json."""
    own_code: bool
    """Whether the architecture is Python code in the model's folder."""
    pooling: tuple[str, ...]
    """Modes of the Pooling module; empty without one."""
    is_cached: bool
    """Whether the loss itself embeds mini-batches of one column."""
    drops_prompts: bool = False
    """Whether pooling excludes the tokens of prompts."""
    pads_left: bool = False
    """Whether the tokenizer pads on the left."""
    other_modules: tuple[str, ...] = ()
    """Class names of modules that are not in TEXT_BY_TEXT."""
    is_decoder: bool = False
    """Whether tokens attend to earlier tokens only."""
    guide_obstacle: str | None = None
    """Why the guide of the loss, which gets the same features, cannot process one row; None if nothing prevents it."""


def choose(wanted: Literal["auto"] | Packing, facts: Facts) -> tuple[Packing, str]:
    """Return how training runs the forward pass, and the reason. An impossible choice falls back to the next best."""
    if wanted == "plain":
        return "plain", "as the recipe says"
    why_not = obstacle(facts) or (facts.guide_obstacle and f"the guide: {facts.guide_obstacle}")
    if wanted != "chunked" and why_not is None:
        return "packed", "one row of real tokens, no padding"
    why = "as the recipe says" if wanted == "chunked" else f"not packed: {why_not}"
    if facts.other_modules:
        return "plain", f"{why}, and for the same reason not chunked"
    if facts.is_cached:
        return "plain", f"{why}; not chunked: the loss makes its own mini-batches"
    if facts.drops_prompts:
        return "plain", f"{why}; not chunked: pooling cannot exclude the different prompts in a chunk"
    if facts.pads_left:
        return "plain", f"{why}; not chunked: the tokenizer pads on the left"
    return "chunked", f"{why}; {NUM_CHUNKS} chunks of similar lengths"


def other_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return those class names of modules that may mix several texts."""
    return tuple(name for name in names if name not in TEXT_BY_TEXT)


def obstacle(facts: Facts) -> str | None:
    """Return why a model cannot process its texts in one row; None if it can."""
    if facts.other_modules:
        return f"its module {facts.other_modules[0]} may mix several texts"
    if facts.is_decoder:
        return "its tokens attend to earlier tokens only"
    if facts.own_code:
        return "the model has code of its own, which does not know where a text begins"
    if facts.model_type not in PACKED_MODEL_TYPES:
        return f"untested for the architecture {facts.model_type or 'of this model'}"
    other = [mode for mode in facts.pooling if mode not in PACKED_POOLING]
    if not facts.pooling or other:
        return f"untested for {'pooling ' + other[0] if other else 'a model without a Pooling module'}"
    return None


# Settings of a Pooling module that sentence-transformers before version 5 saved.
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_packing_facts(config: Config, folder: Path | None) -> Facts | None:
    """Read the facts of the recipe's model, whose files are in `folder`, and of the guide of its loss.

    None if the files of either are not on this machine. Raises ConfigError if one of their files cannot be read, and
    otherwise as `locate` for the guide."""
    facts = _of_model(config.model, folder, config.loss.is_cached)
    if facts is None or not isinstance(config.loss, GuidedLossConfig):
        return facts
    model = ModelConfig(name_or_path=config.loss.guide)
    guide = _of_model(model, locate(model), config.loss.is_cached)
    return None if guide is None else facts._replace(guide_obstacle=obstacle(guide))


def _of_model(model: ModelConfig, folder: Path | None, is_cached: bool) -> Facts | None:
    if folder is None:
        return None
    with reading(folder):
        return _read_facts(model, folder, is_cached)


def _read_facts(model: ModelConfig, folder: Path, is_cached: bool) -> Facts:
    transformer = _module(folder, "Transformer") or folder
    config, pooling = _config(transformer), _pooling(folder)
    return Facts(
        model_type=config.get("model_type"),
        own_code=model.trust_remote_code and "auto_map" in config,
        pooling=_modes(pooling),
        is_cached=is_cached,
        drops_prompts=pooling is not None and not pooling.get("include_prompt", True),
        pads_left=_read(transformer / "tokenizer_config.json").get("padding_side") == "left",
        other_modules=other_modules(_type_names(folder)),
        is_decoder=bool(config.get("is_decoder")),
    )


def _pooling(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the Pooling module; None without one. A folder without modules.json gets mean pooling."""
    if not (folder / "modules.json").is_file():
        return {"pooling_mode": "mean"}
    module = _module(folder, "Pooling")
    return None if module is None else _config(module)


def _module(folder: Path, name: str) -> Path | None:
    modules = _read(folder / "modules.json") or []
    return next((folder / module["path"] for module in modules if module["type"].endswith(f".{name}")), None)


def _type_names(folder: Path) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in _read(folder / "modules.json") or []]


def _modes(pooling: dict[str, Any] | None) -> tuple[str, ...]:
    if pooling is None:
        return ()
    modes = pooling.get("pooling_mode") or [mode for key, mode in _OLD_POOLING.items() if pooling.get(key)] or ["mean"]
    return (modes,) if isinstance(modes, str) else tuple(modes)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = _read(folder / "config.json")
    return config


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
