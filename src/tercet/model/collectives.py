"""What all ranks of a process group hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tercet.errors import TercetError


def world_size() -> int:
    """1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(own: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, which are of one shape, in the order of ranks. Every rank must call it."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.contiguous())
    return gathered


def gather_objects(own: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [own]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered


def run_on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; or raises, on every rank."""
    import torch.distributed as dist

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
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
