"""A sparse gradient for the word embeddings.

A step uses a few thousand tokens of a vocabulary of 30,000 to 250,000; the other rows of the gradient are zero. Still,
autograd allocates and clears a whole gradient in each step (46 MB for all-MiniLM-L6-v2, 3 % of a packed step on a CPU),
and DistributedDataParallel sends all of it: half of what it sends for that model, two thirds for a multilingual encoder
of base size. Here one gradient is kept. Each step clears only the rows of the step before, and ranks exchange only the
rows that they used. That exchange overlaps with nothing: in a backward pass this gradient comes last. On GPUs autograd
and DDP do it, because here the host reads how many rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tercet.model.collectives import gather, world_size


class EmbeddingGradient:
    """Computes and averages the gradient of a model's word embeddings instead of autograd and DDP."""

    def __init__(self, model: torch.nn.Module, name: str, embedding: torch.nn.Embedding) -> None:
        """To be made before the model is wrapped. name: of the embeddings' weight, within `model`."""
        self._embedding = embedding
        self._gradient: torch.Tensor | None = None
        self._touched: list[torch.Tensor] = []
        """Indices of the rows of `_gradient` that may not be zero."""
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])
        embedding.forward = self._look_up

    def _look_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Replaces `torch.nn.Embedding.forward`: shape (...) to (..., width)."""
        embeddings: torch.Tensor = _LookUp.apply(tokens, self._embedding.weight, self)
        return embeddings

    def add(self, tokens: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of looked-up rows. tokens: shape (...); gradient: shape (..., width)."""
        weight = self._embedding.weight
        if weight.grad is None:  # first backward pass of a step
            if self._gradient is None:
                self._gradient = torch.zeros_like(weight)
            for rows in self._touched:
                self._gradient.index_fill_(0, rows, 0.0)
            self._touched.clear()
            weight.grad = self._gradient
        rows, places = tokens.unique(return_inverse=True)
        row_gradients = torch.ops.aten.embedding_dense_backward(gradient, places, len(rows), -1, False)
        if self._embedding.padding_idx is not None:
            row_gradients.masked_fill_((rows == self._embedding.padding_idx)[:, None], 0.0)
        weight.grad.index_add_(0, rows, row_gradients)
        self._touched.append(rows)

    def average(self) -> None:
        """Average the gradient over all ranks, before an optimizer step. All ranks must call it, and get equal bits."""
        num_ranks = world_size()
        if num_ranks == 1:
            return
        gradient = self._gradient
        assert gradient is not None
        own = torch.cat(self._touched).unique()
        counts = torch.cat(gather(torch.tensor([len(own)], device=own.device))).tolist()
        most = max(counts)
        if num_ranks * most >= len(gradient):  # a large batch uses most of the vocabulary
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
    """Looks up rows of a weight, and passes their gradient to an EmbeddingGradient."""

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
    """Return the sparse gradient for the word embeddings of a SentenceTransformer that is not wrapped yet.

    None if they are not trained, are tied to another weight, or belong to a model's own code, and where it would not
    save time."""
    encoder: Any = getattr(model[0], "model", None)
    # A model's own code might look rows up without calling the module.
    if not type(encoder).__module__.startswith("transformers.models."):
        return None
    embedding = encoder.get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding or not embedding.weight.requires_grad:
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse or not _saves_time(embedding):
        return None
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding.weight]
    return EmbeddingGradient(model, names[0], embedding) if len(names) == 1 else None


def _saves_time(embedding: torch.nn.Embedding) -> bool:
    """Return whether a sparse gradient is faster: on CPUs.

    On a GPU, the number of rows that a step used must be read back, once in each backward pass, so the host would wait
    for the device in every step. DDP sends the whole gradient while the backward pass still runs; see docs/log.md."""
    return bool(embedding.weight.device.type == "cpu")
