"""Dropout for CPUs that draws 16 random bits per element.

torch 2.13 draws 64 bits and converts them to a floating-point number: on a packed batch, that is a tenth of a training
step. The bits come from torch's generator, so they are replayed, saved and restored as usual.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def draw_kept(like: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return a random mask of the shape and type of `like`, to multiply with.

    Elements are 0 with probability `dropout` (rounded to 1/65536 on a CPU), else 1 / (1 - dropout)."""
    kept = torch.empty_like(like, memory_format=torch.contiguous_format)
    if like.device.type != "cpu":
        return kept.bernoulli_(1 - dropout).div_(1 - dropout)
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    num_dropped = round(dropout * 2**16)  # of the 65,536 possible numbers
    if num_dropped == 2**16:
        return kept.zero_()
    torch.ge(bits[: like.numel()].view(like.shape), num_dropped - 2**15, out=kept)
    return kept.mul_(1 / (1 - dropout))


def use_fast_cpu_dropout(model: torch.nn.Module) -> None:
    """Make the dropout modules of a model use `draw_kept` on a CPU. On a GPU, torch's own dropout is one kernel."""
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces `torch.nn.Dropout.forward`."""
    if not self.training or self.p == 0.0 or x.device.type != "cpu":
        return torch.nn.functional.dropout(x, self.p, self.training)
    return x * draw_kept(x, self.p)
