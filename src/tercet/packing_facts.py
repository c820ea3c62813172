"""What decides how a model's texts share a forward pass, from its files alone, so that the plan can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tercet.config import Config
from tercet.loss_config import GuidedLossConfig
from tercet.model_source import locate, reading
from tercet.packing import Facts, obstacle, other_modules
from tercet.sections import ModelConfig

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
