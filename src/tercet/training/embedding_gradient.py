"""The gradient of the word embeddings, row by row.

A step touches a few thousand tokens of a vocabulary of 30,000 to 250,000; the rest of that gradient is zero. And yet
autograd makes a new one of zeros in each step (46 MB for all-MiniLM-L6-v2: 3 % of a packed step on a CPU), and
DistributedDataParallel sends all of it: half of what it sends for that model, two thirds for a multilingual encoder of
base size. Here one is kept, of which a step clears the rows of the step before, and ranks exchange the rows that they
touched. There is nothing to overlap that with: in a backward pass this gradient comes last.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tercet.model.collectives import gather, world_size


class EmbeddingGradient:
    """Takes the word embeddings of a model out of autograd's and DistributedDataParallel's hands."""

    def __init__(self, model: torch.nn.Module, name: str, embedding: torch.nn.Embedding) -> None:
        """Before the model is wrapped. name: of the weight, within `model`."""
        self._embedding = embedding
        self._gradient: torch.Tensor | None = None
        self._touched: list[torch.Tensor] = []
        """Numbers of the rows of `_gradient` that may not be zero."""
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
        embedding.forward = self._look_up

    def _look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Instead of `torch.nn.Embedding.forward`."""
        found: torch.Tensor = _LookUp.apply(tokens, self._embedding.weight, self)
        return found

    def add(self, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        """The gradient of what was looked up: shapes (...) and (..., width)."""
        weight = self._embedding.weight
        if weight.grad is None:  # a step begins
            if self._gradient is None:
                self._gradient = torch.zeros_like(weight)
            for rows in self._touched:
                self._gradient.index_fill_(0, rows, 0.0)
            self._touched.clear()
            weight.grad = self._gradient
        rows, places = tokens.unique(return_inverse=True)
        of_rows = torch.ops.aten.embedding_dense_backward(gradient, places, len(rows), -1, False)
        if self._embedding.padding_idx is not None:
            of_rows.masked_fill_((rows == self._embedding.padding_idx)[:, None], 0.0)
        weight.grad.index_add_(0, rows, of_rows)
        self._touched.append(rows)

    def average(self) -> None:
        """Over all ranks, before an optimizer step. Every rank must call it. Ranks end with the same bits."""
        num_ranks = world_size()
        if num_ranks == 1:
            return
        gradient = self._gradient
        assert gradient is not None
        own = torch.cat(self._touched).unique()
        counts = torch.cat(gather(torch.tensor([len(own)], device=own.device))).tolist()
        most = max(counts)
        if num_ranks * most >= len(gradient):  # a large batch touches most of the vocabulary
            dist.all_reduce(gradient.div_(num_ranks))
            self._touched = [torch.arange(len(gradient), device=own.device)]
            return
        rows = gradient.new_zeros(most, gradient.shape[1])
        rows[: len(own)] = gradient[own] / num_ranks
        numbers = torch.nn.functional.pad(own, (0, most - len(own)))
        gradient.index_fill_(0, own, 0.0)
        self._touched.clear()
        for count, their_numbers, their_rows in zip(counts, gather(numbers), gather(rows), strict=True):
            gradient.index_add_(0, their_numbers[:count], their_rows[:count])
            self._touched.append(their_numbers[:count])


class _LookUp(torch.autograd.Function):  # type: ignore[misc]
    """Rows of a weight, whose gradient goes to an EmbeddingGradient."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, to: EmbeddingGradient) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.to = to
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.to.add(*ctx.saved_tensors, gradient)
        return None, None, None


def embedding_gradient(model: Any) -> EmbeddingGradient | None:
    """Of a SentenceTransformer that is to be wrapped. None where they are not trained, tied to another weight, or
    of a model's own code; and where it would not pay."""
    encoder: Any = getattr(model[0], "model", None)
    # A model's own code might look rows up without calling the module.
    if not type(encoder).__module__.startswith("transformers.models."):
        return None
    embedding = encoder.get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding or not embedding.weight.requires_grad:
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse or not _pays(embedding):
        return None
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding.weight]
    return EmbeddingGradient(model, names[0], embedding) if len(names) == 1 else None


def _pays(embedding: torch.nn.Embedding) -> bool:
    """On CPUs, and between machines. GPUs of one machine clear and send tens of megabytes in less time than each step
    would wait here, for the numbers of rows to come from the GPU (not measured)."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return embedding.weight.device.type == "cpu" or ranks_here < world_size()
