"""The model to train: loaded from the recipe or from a checkpoint, and written whole again."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from tercet.encoder import freeze_unused, load_model, stored_model
from tercet.lora import add_adapter, load_trained, save_merged
from tercet.sections import ModelConfig
from tercet.sharding import check_saved, fill, unsharded


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
