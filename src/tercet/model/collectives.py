"""Communication among the ranks of a process group; without a group, all of it works for a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
