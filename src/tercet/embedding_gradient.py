"""The gradient of the word embeddings, averaged over ranks row by row.

A step touches a few thousand tokens of a vocabulary of 30,000 to 250,000. The rest of that gradient is zero, and yet
DistributedDataParallel sends all of it: half of what it sends for all-MiniLM-L6-v2, two thirds for a multilingual
encoder of base size. Here ranks exchange the rows that they touched. There is nothing to overlap it with: in a backward
pass this gradient comes last.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tercet.ranks import gather


class EmbeddingGradient:
    """Takes the word embeddings of a model out of DistributedDataParallel's hands."""

    def __init__(self, model: torch.nn.Module, name: str, embedding: torch.nn.Module) -> None:
        """Before the model is wrapped. name: of the weight, within `model`."""
        self._weight: torch.nn.Parameter = embedding.weight
        self._touched: list[torch.Tensor] = []
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
        embedding.register_forward_pre_hook(self._note)

    def _note(self, embedding: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if embedding.training:
            self._touched.append(arguments[0].detach().flatten())

    def average(self) -> None:
        """Over all ranks, before an optimizer step. Every rank must call it. Ranks end with the same bits."""
        gradient = self._weight.grad
        assert gradient is not None
        own = torch.cat(self._touched).unique()
        self._touched.clear()
        world_size = dist.get_world_size()
        counts = torch.cat(gather(torch.tensor([len(own)], device=own.device))).tolist()
        most = max(counts)
        if world_size * most >= len(gradient):  # a large batch touches most of the vocabulary
            dist.all_reduce(gradient.div_(world_size))
            return
        rows = gradient.new_zeros(most, gradient.shape[1])
        rows[: len(own)] = gradient[own] / world_size
        numbers = torch.nn.functional.pad(own, (0, most - len(own)))
        all_rows, all_numbers = gather(rows), gather(numbers)
        gradient.index_fill_(0, own, 0.0)
        for count, their_numbers, their_rows in zip(counts, all_numbers, all_rows, strict=True):
            gradient.index_add_(0, their_numbers[:count], their_rows[:count])


def embedding_gradient(model: Any) -> EmbeddingGradient | None:
    """Of a SentenceTransformer that is to be wrapped. None where they are not trained, tied to another weight, or
    of a model's own code; and where it would not pay."""
    if not _pays():
        return None
    encoder: Any = getattr(model[0], "model", None)
    # A model's own code might look rows up without calling the module.
    if not type(encoder).__module__.startswith("transformers.models."):
        return None
    embedding = encoder.get_input_embeddings()
    if not isinstance(embedding, torch.nn.Embedding) or not embedding.weight.requires_grad:
        return None
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding.weight]
    return EmbeddingGradient(model, names[0], embedding) if len(names) == 1 else None


def _pays() -> bool:
    """Between CPUs, and between machines. GPUs of one machine send tens of megabytes in less time than each step would
    wait here, for the numbers of rows to come from the GPU (not measured)."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return world_size > 1 and (dist.get_backend() == "gloo" or ranks_here < world_size)
