"""Communication among the ranks of a process group; without a group, all of it works for a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from tercet.errors import TercetError


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(own: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all ranks, in the order of ranks. All have the same shape. Every rank must call it.

    Needs a process group."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.contiguous())
    return gathered


class _GatherRows(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, shares: tuple[int, ...]) -> torch.Tensor:
        rank = dist.get_rank()
        ctx.start, ctx.num_rows, ctx.shape = sum(shares[:rank]), shares[rank], own.shape
        padded = own.new_zeros((max(shares), *own.shape[1:]))
        padded[: shares[rank]] = own[: shares[rank]]
        return torch.cat([part[:num_rows] for part, num_rows in zip(gather(padded), shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = gradient.new_zeros(ctx.shape)
        own[: ctx.num_rows] = dist.get_world_size() * gradient[ctx.start : ctx.start + ctx.num_rows]
        return own, None


def gather_rows(own: torch.Tensor, shares: tuple[int, ...]) -> torch.Tensor:
    """Return the rows of all ranks, in the order of ranks: shape (sum of shares, …). Every rank must call it.

    own: this rank's rows, of which the first `shares[rank]` count. All ranks must compute the same loss from the
    result. Then the mean of the ranks' gradients, which they form afterwards, is the gradient of that loss: each rank's
    rows get their gradient times the number of ranks."""
    return cast(torch.Tensor, _GatherRows.apply(own, shares))


def gather_objects(own: Any, group: Any = None) -> list[Any]:
    """Return the objects of all ranks, in the order of ranks. They are pickled. Every rank must call it.

    group: a group of all ranks that does not use the GPU, for a call that must not wait for it."""
    if not dist.is_initialized():
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def run_on_rank_0(work: Callable[[], Any]) -> Any:
    """Call `work` on rank 0 only, and return its result on every rank. Every rank must call it.

    A TercetError is raised on every rank. Any other error is raised on rank 0 alone."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [work()]
        except TercetError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], TercetError):
        raise box[0]
    return box[0]


def wait_for_all_ranks() -> None:
    """Return once every rank has called this."""
    if dist.is_initialized():
        dist.barrier()
