"""Locate the base model (a folder, a Python package, or a hub), and read its size from its files.

Only JSON and the headers of the weights are read, without a machine-learning library, so that `tercet plan` answers at
once.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, CorruptObject
from tercet.planning import new_architecture
from tercet.storage.base import sha256_of

PACKAGE_SCHEME = "package:"


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that determine memory and time. Sizes are in elements."""

    num_parameters: int
    num_embedding_parameters: int
    num_layers: int
    hidden_size: int
    max_seq_length: int | None
    num_heads: int = 0
    """Heads of attention; 0 where the configuration does not say."""


def locate(model: ModelConfig) -> Path | None:
    """Return the model's folder on this machine; None for a hub name.

    Raises ConfigError if there is no such folder or package, or it contains no model; CorruptObject if the sha256 of
    the weights is not the one in the recipe."""
    if model.name_or_path.startswith(PACKAGE_SCHEME):
        folder = _inside_package(model.name_or_path.removeprefix(PACKAGE_SCHEME))
    else:
        folder = Path(model.name_or_path)
        if folder.is_file():
            raise ConfigError(f"model.name_or_path: {folder} is a file", hint="give the folder of a model")
        if not folder.is_dir():
            if folder.is_absolute() or model.name_or_path.startswith((".", "~")):
                raise ConfigError(f"model.name_or_path: there is no folder {folder}", hint="check the path")
            return None
        if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
            raise ConfigError(
                f"model.name_or_path: {folder} contains no model: neither config.json nor modules.json",
                hint="check the path",
            )
    if model.sha256 is not None:
        check_sha256(folder, model.sha256)
    return folder


def check_sha256(folder: Path, expected: str) -> None:
    """Raise CorruptObject unless `model.safetensors` in `folder` has the expected sha256."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CorruptObject(
            f"{folder} contains no model.safetensors, but the recipe pins its sha256", hint="check model.sha256"
        )
    actual = sha256_of(path)
    if actual != expected:
        raise CorruptObject(
            f"{path}: the sha256 is {actual}, but the recipe pins {expected}",
            hint="the weights are different: install the model again, or change model.sha256 on purpose",
        )


def _inside_package(package: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.name_or_path: the Python package {package!r} is not installed",
            hint=f"pip install {package.replace('_', '-')}",
        )
    root = Path(spec.origin).parent
    folders = sorted(path.parent for path in root.rglob("modules.json"))
    if not folders:
        raise ConfigError(
            f"model.name_or_path: package {package!r} contains no model: there is no modules.json",
            hint="check the name of the package",
        )
    return folders[0]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise ConfigError for an error in the block: a file of the model is unreadable, or has another format."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        what = f"the files of the model {folder} cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(what, hint="download the model again") from None


def read_facts(folder: Path) -> ModelFacts | None:
    """Read the facts from config.json and the headers of the weights; None if the files do not have all of them.

    Raises ConfigError if the weights are not in safetensors format, or a file cannot be read."""
    with reading(folder):
        return _read_facts(folder)


def _read_facts(folder: Path) -> ModelFacts | None:
    transformer = encoder_folder(folder)
    weights = _weight_files(transformer) if transformer else []
    if transformer is None or not weights:
        return None
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    shapes = {name: shape for path in weights for name, shape in _tensor_shapes(path).items()}
    if config.get("model_type") == new_architecture.MODEL_TYPE:
        shapes = {name: shape for name, shape in shapes.items() if new_architecture.is_encoder_tensor(name)} or shapes
    limits = folder / "sentence_bert_config.json"
    max_seq_length = json.loads(limits.read_text(encoding="utf-8")).get("max_seq_length") if limits.is_file() else None
    try:
        return ModelFacts(
            num_parameters=sum(math.prod(shape) for shape in shapes.values()),
            num_embedding_parameters=sum(math.prod(shape) for name, shape in shapes.items() if "embed" in name),
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            max_seq_length=max_seq_length or config.get("max_position_embeddings"),
            num_heads=int(config.get("num_attention_heads") or 0),
        )
    except KeyError:
        return None


def encoder_folder(folder: Path) -> Path | None:
    """Return the folder of the encoder's config.json in a model's folder; None if there is none."""
    return next((path for path in (folder, folder / "0_Transformer") if (path / "config.json").is_file()), None)


class NativeConfig(NamedTuple):
    """How an architecture that has code of its own is loaded without it."""

    config: dict[str, Any] | None
    """The configuration of the same architecture in transformers; None if the folder is loaded as it is."""
    obstacle: str | None = None
    """Why an architecture that transformers has cannot be loaded from this folder."""


def native_config(model: ModelConfig, folder: Path) -> NativeConfig:
    """Return how the model in `folder` is loaded. Raises ConfigError if its files cannot be read."""
    place = encoder_folder(folder)
    if model.trust_remote_code or place is None:
        return NativeConfig(None)
    with reading(folder):
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != new_architecture.MODEL_TYPE:
            return NativeConfig(None)
        if changed := new_architecture.ROTARY.intersection(model.config_kwargs):
            return NativeConfig(None, f"model.config_kwargs changes {' and '.join(sorted(changed))}")
        names = [name for path in _weight_files(place) for name in _tensor_shapes(path)]
        if (obstacle := new_architecture.obstacle(config, names)) is not None:
            return NativeConfig(None, obstacle)
        return NativeConfig(new_architecture.as_gte(config))


def _weight_files(folder: Path) -> list[Path]:
    """Return the file of the weights, or all files that the index names; empty if one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names] if all((folder / name).is_file() for name in names) else []


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of floating-point tensors from a safetensors header: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        # A git-lfs pointer is text: its first eight bytes would be an impossible length.
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > path.stat().st_size:
            raise ConfigError(
                f"{path} is not a safetensors file", hint="if it was cloned without LFS, run: git lfs pull"
            )
        header = json.loads(file.read(num_bytes))
    return {name: entry["shape"] for name, entry in header.items() if "F" in entry.get("dtype", "")}
