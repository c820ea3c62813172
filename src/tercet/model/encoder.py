"""The model, checked against what the recipe says of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from tercet.artifacts.checkpoint import Commit, fetch
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, first_line
from tercet.model.lora import add_adapter, load_trained, save_merged
from tercet.model.sharding import check_saved, fill, unsharded
from tercet.planning.model_files import check_sha256, locate
from tercet.storage import Storage


def load_model(config: ModelConfig, device: str | None = None) -> SentenceTransformer:
    """The base model, checked against what the recipe says of it.

    Raises ConfigError when it cannot be loaded or is not the architecture that the recipe names."""
    folder = locate(config)
    try:
        model = SentenceTransformer(
            str(folder or config.name_or_path),
            device=device,
            revision=None if folder else config.revision,
            trust_remote_code=config.trust_remote_code,
            config_kwargs=dict(config.config_kwargs) or None,
            # transformers 5 otherwise keeps the type of the files: fp16 weights would lose most of a small step.
            model_kwargs={"dtype": "float32"},
        )
    except (OSError, ValueError, ImportError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        hint = "is the name right, and does this machine reach the hub?"
        if "trust_remote_code" in str(error):
            hint = "read the model's code at the pinned revision, then set model.trust_remote_code: true"
        elif isinstance(error, ImportError):
            hint = "install what the model's own code asks for, or switch that part off in model.config_kwargs"
        elif offline:
            hint = "HF_HUB_OFFLINE is set: only local folders and cached models can be loaded"
        raise ConfigError(f"model.name_or_path={config.name_or_path}: {first_line(error)}", hint) from error
    if folder is None and config.sha256 is not None:
        check_sha256(_hub_folder(config), config.sha256)
    if config.max_seq_length is not None:
        model.max_seq_length = config.max_seq_length
    if config.prompts is not None:
        model.prompts = {**model.prompts, "query": config.prompts.query, "document": config.prompts.document}
    _check_architecture(config, model)
    return model


def stored_model(config: ModelConfig, folder: Path) -> ModelConfig:
    """The recipe's model, as it lies in a folder that tercet wrote: the same code and limits, other weights."""
    return config.model_copy(update={"name_or_path": str(folder), "revision": None, "sha256": None})


def reloaded(config: ModelConfig, storage: Storage, commit: Commit, folder: Path) -> ModelConfig:
    """The recipe's model with the weights of a commit, which are brought to `folder` and verified.

    Raises CorruptObject, ObjectNotFound."""
    fetch(storage, commit, folder, commit.model_files())
    return stored_model(config, folder)


def freeze_unused(model: SentenceTransformer) -> None:
    """The pooler of BERT and its kin, which the Pooling module does not use: without a gradient it has no optimizer
    state, which FSDP2 misses on resume, and weight decay would shrink it under ZeRO."""
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            parameter.requires_grad_(False)


def _hub_folder(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.name_or_path, revision=config.revision, local_files_only=True))


def _check_architecture(config: ModelConfig, model: SentenceTransformer) -> None:
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
    """The recipe's model with what a checkpoint trained, where there is one."""
    if config.lora is None:
        model = load_model(stored_model(config, resume_dir) if resume_dir else config, device)
    else:
        model = load_model(config, device)
        add_adapter(model, config.lora)
        if resume_dir is not None:
            load_trained(model, resume_dir)
    freeze_unused(model)
    return model


def save_whole(config: ModelConfig, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a servable model from the gathered weights of a trained one. Raises CorruptObject unless it is complete.

    They are put into a model of its own, made on the CPU for the purpose: no rank's shards are touched. Loading it may
    draw random numbers; those of training stay as they are."""
    with unsharded(), torch.random.fork_rng(devices=[]):
        model = make_model(config, "cpu")
    fill(model, weights)
    if config.lora is None:
        model.save_pretrained(str(folder), create_model_card=False)
    else:
        save_merged(model, folder)
    check_saved(folder, model)
