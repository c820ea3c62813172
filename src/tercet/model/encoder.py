"""Loads the recipe's model, checks it against the recipe, and saves it whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from tercet.artifacts.checkpoint import Commit, fetch
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, TercetError, first_line
from tercet.model.lora import add_adapter, load_trained, save_merged
from tercet.planning.model_files import NativeConfig, check_sha256, encoder_folder, locate, native_config
from tercet.planning.new_architecture import FAST_PATH, MODEL_TYPE
from tercet.storage import Storage

# For `cached_file`: None, not an error, where a file or the hub cannot be had. Loading then explains it.
_OPTIONAL: dict[str, Any] = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
_LOADED_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def load_model(config: ModelConfig, device: str | None = None) -> SentenceTransformer:
    """Return the base model, checked against the recipe.

    Raises ConfigError when it cannot be loaded, or when its files or architecture differ from what the recipe names."""
    folder = locate(config)
    obstacle = None
    try:
        with native_folder(config, folder or _new_on_hub(config)) as (place, obstacle):
            model = SentenceTransformer(
                str(place or config.name_or_path),
                device=device,
                revision=None if place else config.revision,
                trust_remote_code=config.trust_remote_code,
                config_kwargs=_config_kwargs(config, is_native=place != folder) or None,
                # By default, transformers 5 keeps the type of the files: small steps would be lost in fp16 weights.
                model_kwargs={"dtype": "float32"},
            )
    except Exception as error:
        if not _is_due_to_files(error):
            raise
        raise _not_loaded(config, error, obstacle) from error
    if folder is None and config.sha256 is not None:
        check_sha256(_hub_folder(config), config.sha256)
    if config.max_seq_length is not None:
        model.max_seq_length = config.max_seq_length
    if config.prompts is not None:
        model.prompts = {**model.prompts, "query": config.prompts.query, "document": config.prompts.document}
    _check_architecture(config, model)
    return model


def _is_due_to_files(error: Exception) -> bool:
    """Return whether a model could not be loaded because of its files or its name, and not because of the machine."""
    if isinstance(error, RuntimeError):  # such as a device without memory
        return "mismatch" in str(error)
    return not isinstance(error, TercetError | MemoryError)


def _not_loaded(config: ModelConfig, error: Exception, obstacle: str | None) -> ConfigError:
    """Return the error that explains why a model could not be loaded. obstacle: as `native_folder` yields it."""
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    what, hint = first_line(error), "is the name right, and can this machine reach the Hugging Face Hub?"
    if "trust_remote_code" in str(error) or obstacle is not None:
        hint = "read the model's code at the pinned revision, then set model.trust_remote_code: true"
        if obstacle is not None:
            hint += f" (without it: {obstacle})"
    elif isinstance(error, RuntimeError):
        what = "its weights do not have the shapes that its config.json describes; the log has the list"
        hint = "download the model again, or check model.config_kwargs"
    elif isinstance(error, ImportError):
        hint = "install what the model's own code imports, or switch that part off in model.config_kwargs"
    elif not isinstance(error, OSError | ValueError):
        what = f"{type(error).__name__}: {what}"
        hint = "its files are damaged, or its config.json or model.config_kwargs has a wrong value"
    elif offline:
        hint = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: only local folders and cached models can be loaded"
    return ConfigError(f"model.name_or_path={config.name_or_path}: {what}", hint)


@contextlib.contextmanager
def native_folder(config: ModelConfig, folder: Path | None) -> Iterator[tuple[Path | None, str | None]]:
    """Inside the block, there is a folder to load a model from without its own code.

    Yields `folder` itself, unless transformers has the architecture under another name; then a folder of links to its
    files, without code, and with a configuration of that name. Also yields why such an architecture is not loaded so,
    if it is not. Raises ConfigError if the files cannot be read."""
    native = NativeConfig(None) if folder is None else native_config(config, folder)
    if folder is None or native.config is None:
        yield folder, native.obstacle
        return
    with tempfile.TemporaryDirectory(prefix="tercet-native-") as name:
        place = Path(name) / "model"
        # Hub snapshots are links already: to files whose names do not end in .py.
        shutil.copytree(
            folder.resolve(),
            place,
            copy_function=os.symlink,
            ignore=shutil.ignore_patterns("*.py", "__pycache__", ".git"),
        )
        encoder = encoder_folder(place)
        assert encoder is not None
        (encoder / "config.json").unlink()
        (encoder / "config.json").write_text(json.dumps(native.config, indent=2), encoding="utf-8")
        yield place, None


def _new_on_hub(config: ModelConfig) -> Path | None:
    """Return the downloaded folder of a hub model whose architecture transformers may have under another name."""
    if config.trust_remote_code or locate(config) is not None:
        return None
    path = cached_file(config.name_or_path, "config.json", revision=config.revision, **_OPTIONAL)
    if path is None or json.loads(Path(path).read_text(encoding="utf-8")).get("model_type") != MODEL_TYPE:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.name_or_path, revision=config.revision, allow_patterns=_LOADED_FILES))


def _config_kwargs(config: ModelConfig, is_native: bool) -> dict[str, Any]:
    """Return changes to the model's configuration, without switches that the native architecture does not have."""
    return {key: value for key, value in config.config_kwargs.items() if not (is_native and key in FAST_PATH)}


def stored_model(config: ModelConfig, folder: Path) -> ModelConfig:
    """Return the recipe's model section for a folder that tercet wrote: the same code and limits, other weights."""
    return config.model_copy(update={"name_or_path": str(folder), "revision": None, "sha256": None})


def reloaded(config: ModelConfig, storage: Storage, commit: Commit, folder: Path) -> ModelConfig:
    """Download and verify the model of a commit, and return the recipe's model section for it.

    Raises CorruptObject when a file is damaged, ObjectNotFound when one is missing."""
    fetch(storage, commit, folder, commit.model_files())
    return stored_model(config, folder)


def freeze_unused(model: SentenceTransformer) -> None:
    """Freeze the pooler of BERT-like models, which the Pooling module does not use.

    It gets no gradient. So it would have no optimizer state, which FSDP2 expects on resume, and ZeRO's weight decay
    would shrink it."""
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            parameter.requires_grad_(False)


def _hub_folder(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.name_or_path, revision=config.revision, local_files_only=True))


def _check_architecture(config: ModelConfig, model: SentenceTransformer) -> None:
    tokenizer = model.tokenizer
    # transformers 5 makes a tokenizer without any word where a folder has no files of one.
    if isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(
            f"model.name_or_path={config.name_or_path}: the tokenizer knows no words",
            hint="the folder has no tokenizer.json or vocabulary: download the model again",
        )
    modules = {type(module).__name__: module for module in model}
    if config.pooling is not None:
        pooling = modules.get("Pooling")
        mode = pooling.pooling_mode if pooling is not None else None
        mode = mode[0] if isinstance(mode, list | tuple) and len(mode) == 1 else mode
        if mode != config.pooling:
            raise ConfigError(
                f"model.pooling={config.pooling}, but the loaded model has {mode}", hint="pin the revision"
            )
    if config.dense_features is not None:
        dense = modules.get("Dense")
        width = dense.out_features if dense is not None else None
        if width != config.dense_features:
            raise ConfigError(
                f"model.dense_features={config.dense_features}, but the loaded model has {width or 'no Dense layer'}",
                hint="pin the revision",
            )


def make_model(config: ModelConfig, device: str, resume_dir: Path | None = None) -> SentenceTransformer:
    """Return the recipe's model, ready to be trained, with the weights of a checkpoint if `resume_dir` has one.

    Raises ConfigError as `load_model`, CorruptObject as `load_trained`."""
    if config.lora is None:
        model = load_model(stored_model(config, resume_dir) if resume_dir else config, device)
    else:
        model = load_model(config, device)
        add_adapter(model, config.lora)
        if resume_dir is not None:
            load_trained(model, resume_dir)
    freeze_unused(model)
    return model


def save(config: ModelConfig, model: SentenceTransformer, folder: Path) -> None:
    """Write a servable model to a folder. If the recipe trains an adapter, `model` has one, and is unusable afterwards:
    see `save_merged`."""
    if config.lora is None:
        model.save_pretrained(str(folder), create_model_card=False)
    else:
        save_merged(model, folder)
