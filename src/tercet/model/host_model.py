"""A model on the host that takes the trained weights; checkpoints are written from it while training continues."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from tercet.config.sections import ModelConfig
from tercet.errors import CorruptObject
from tercet.model.encoder import make_model, save
from tercet.model.sharding import full_weights, unsharded

Copy = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies the second tensor into the first, which is on the host; perhaps only later."""


class HostModel:
    """A whole model on the CPU of rank 0, of the same architecture as the one that is trained.

    It keeps the configuration that the model was loaded with. The trainer changes that of the trained model:
    transformers 5.23 puts the tokenizer's `pad_token_id` there. Architectures count positions from it, or compute no
    gradient for its embedding, so a model that is loaded with another one computes something else."""

    def __init__(self, config: ModelConfig, model: SentenceTransformer, is_pinned: bool) -> None:
        """config: what the trained model was made from. model: on the CPU.
        is_pinned: keep the weights in memory into which a GPU copies by itself."""
        self._config, self._model = config, model
        if is_pinned:
            for parameter in model.parameters():
                # One block each: transformers clones weights that share a block.
                parameter.data = parameter.data.pin_memory()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._tensors: dict[str, torch.Tensor] = {**dict(model.named_buffers()), **self._parameters}
        self._problem: CorruptObject | None = None

    @classmethod
    def of(cls, config: ModelConfig, model: SentenceTransformer, is_gathered: bool) -> HostModel:
        """Return one for a model that is about to be trained: not wrapped or changed yet, on any device.

        is_gathered: its weights will be gathered, or have an adapter to merge; it is then made from the recipe again.
        Draws no random number of the training."""
        is_pinned = next(model.parameters()).device.type == "cuda"
        if not is_gathered:
            # deepcopy takes these for copies that it has made already: by the id of the original.
            made: dict[int, Any] = {id(buffer): buffer.detach().cpu().clone() for buffer in model.buffers()}
            for parameter in model.parameters():
                own = parameter.detach().cpu().clone()
                made[id(parameter)] = torch.nn.Parameter(own, parameter.requires_grad)
            return cls(config, copy.deepcopy(model, made), is_pinned)
        with unsharded(), torch.random.fork_rng(devices=[]):
            return cls(config, make_model(config, "cpu"), is_pinned)

    def take(self, model: SentenceTransformer, copy_into: Copy) -> None:
        """Copy all weights and buffers of the trained model. Every rank must gather them, where they are sharded.

        What is wrong with them is raised by `write`: an error here would leave the other ranks waiting."""
        self._problem = None

        def keep(name: str, value: torch.Tensor) -> torch.Tensor:
            own = self._tensors.get(name)
            if own is None:
                return value  # such as a buffer of the packed forward pass
            if own.shape != value.shape:
                self._problem = self._problem or _incomplete(f"{name} is of shape {tuple(value.shape)}", own)
            else:
                copy_into(own.detach(), value)
            return own

        gathered = full_weights(model, keep) or {}
        for name in self._parameters.keys() - gathered.keys():
            self._problem = self._problem or _incomplete(f"{name} is missing", self._parameters[name])

    def write(self, folder: Path) -> None:
        """Write a servable model to a folder.

        Raises CorruptObject if `take` missed a parameter, or got one of another shape."""
        if self._problem is not None:
            raise self._problem
        is_used_up = self._config.lora is not None  # merging an adapter changes the model
        save(self._config, copy.deepcopy(self._model) if is_used_up else self._model, folder)


def _incomplete(what: str, own: torch.Tensor) -> CorruptObject:
    return CorruptObject(
        f"{what} among the gathered weights, and should be of shape {tuple(own.shape)}",
        hint="the model would be saved incomplete: this is a fault of tercet or of the installed libraries",
    )
