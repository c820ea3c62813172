"""What all ranks of a process group hold."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    """1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(own: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, which are of one shape, in the order of ranks. Every rank must call it."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.contiguous())
    return gathered
