"""Dropout for CPUs that draws 16 bits for each number.

torch 2.13 draws 64 and makes a floating-point number of them: on a packed batch that is a tenth of a training step.
Random numbers come from torch's generator, so they are replayed, saved and restored as usual.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def draw_kept(like: torch.Tensor, dropout: float) -> torch.Tensor:
    """Of the shape and type of `like`: 0 with probability `dropout` (to 1/65536), else 1 / (1 - dropout)."""
    kept = torch.empty_like(like, memory_format=torch.contiguous_format)
    if like.device.type != "cpu":
        return kept.bernoulli_(1 - dropout).div_(1 - dropout)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    num_dropped = round(dropout * 2**16)  # of all 16-bit numbers
    if num_dropped == 2**16:
        return kept.zero_()
    torch.ge(bits[: like.numel()].view(like.shape), num_dropped - 2**15, out=kept)
    return kept.mul_(1 / (1 - dropout))


def use_fast_cpu_dropout(model: torch.nn.Module) -> None:
    """Let the dropout modules of a model draw this way on a CPU. On a GPU torch's own is one kernel."""
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Instead of `torch.nn.Dropout.forward`."""
    if not self.training or self.p == 0.0 or x.device.type != "cpu":
        return torch.nn.functional.dropout(x, self.p, self.training)
    return x * draw_kept(x, self.p)
