"""How texts share a forward pass: attention matrices, padded chunks, or nothing. Pure.

In one row of real tokens, linear layers, norms and activations need no padding. Attention is told of the boundaries,
and where it knows only matrices, texts are sorted by length and cut into groups: a group is one batched attention, as
wide as its longest text. Few groups waste little time on calls, many waste little on padding; dynamic programming finds
the cut that costs least.
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

# The architectures whose forward pass takes a row of many texts, as transformers 5.23 writes them; each is under test.
PACKED_MODEL_TYPES = ("bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
# Modules that take each text, or each of its tokens, by itself.
TEXT_BY_TEXT = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LayerNorm")
PACKED_POOLING = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens")

# Padded chunks: more of them pad less, and each is a forward pass of its own. Four were faster than two; more were not
# tried.
NUM_CHUNKS = 4


class Facts(NamedTuple):
    """What decides how a model's texts can share a forward pass."""

    model_type: str | None
    """As in config.json."""
    own_code: bool
    """The architecture is Python code of the model's own folder."""
    pooling: tuple[str, ...]
    """Modes of the Pooling module."""
    is_cached: bool
    """The loss embeds mini-batches of one column by itself."""
    drops_prompts: bool = False
    """Prompts are left out of the pooling."""
    pads_left: bool = False
    """The tokenizer pads on the left."""
    other_modules: tuple[str, ...] = ()
    """Of the model's modules, those that are none of TEXT_BY_TEXT."""
    is_decoder: bool = False
    """Tokens see those before them only."""
    guide_obstacle: str | None = None
    """Why a guide of the loss, which gets the same features, cannot take them in one row."""


def choose(wanted: Literal["auto"] | Packing, facts: Facts) -> tuple[Packing, str]:
    """How training runs the forward pass, and why. What cannot be had falls back to the next best."""
    if wanted == "plain":
        return "plain", "as the recipe says"
    why_not = obstacle(facts) or (facts.guide_obstacle and f"the guide: {facts.guide_obstacle}")
    if wanted != "chunked" and why_not is None:
        return "packed", "one row of real tokens, no padding"
    why = "as the recipe says" if wanted == "chunked" else f"not packed: {why_not}"
    if facts.other_modules:
        return "plain", f"{why}; nor in chunks"
    if facts.is_cached:
        return "plain", f"{why}; the loss cuts its own mini-batches"
    if facts.drops_prompts:
        return "plain", f"{why}; a chunk has texts with different prompts, which its pooling cannot leave out"
    if facts.pads_left:
        return "plain", f"{why}; the tokenizer pads on the left"
    return "chunked", f"{why}; {NUM_CHUNKS} chunks of like lengths"


def other_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Of the classes of a model's modules, those that may look beyond a text."""
    return tuple(name for name in names if name not in TEXT_BY_TEXT)


def obstacle(facts: Facts) -> str | None:
    """Why a model cannot take its texts in one row; None where it can."""
    if facts.other_modules:
        return f"its module {facts.other_modules[0]} may look beyond a text"
    if facts.is_decoder:
        return "its tokens see only those before them"
    if facts.own_code:
        return "the model's own code would have to know of boundaries"
    if facts.model_type not in PACKED_MODEL_TYPES:
        return f"untested for the architecture {facts.model_type or 'of this model'}"
    other = [mode for mode in facts.pooling if mode not in PACKED_POOLING]
    if not facts.pooling or other:
        return f"untested for {'pooling ' + other[0] if other else 'a model without a Pooling module'}"
    return None


# As sentence-transformers wrote a Pooling module before version 5.
_OLD_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_packing_facts(config: Config, folder: Path | None) -> Facts | None:
    """Of the recipe's model, whose files are in `folder`, its loss, and the loss's guide. None where the files of one
    are not on this machine. Raises ConfigError where a file of theirs cannot be read; and as `locate`, of the guide."""
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
    """The settings of the Pooling module, None where the model has none. A folder that does not name its modules gets
    the mean."""
    if not (folder / "modules.json").is_file():
        return {"pooling_mode": "mean"}
    module = _module(folder, "Pooling")
    return None if module is None else _config(module)


def _module(folder: Path, name: str) -> Path | None:
    modules = _read(folder / "modules.json") or []
    return next((folder / found["path"] for found in modules if found["type"].endswith(f".{name}")), None)


def _type_names(folder: Path) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in _read(folder / "modules.json") or []]


def _modes(pooling: dict[str, Any] | None) -> tuple[str, ...]:
    if pooling is None:
        return ()
    modes = pooling.get("pooling_mode") or [mode for key, mode in _OLD_POOLING.items() if pooling.get(key)] or ["mean"]
    return (modes,) if isinstance(modes, str) else tuple(modes)


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = _read(folder / "config.json")
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
