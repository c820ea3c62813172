"""Changes the weights of a whole layer to 16 bits at once, instead of one by one under autocast.

autocast runs a kernel for each weight and bias, and one for each of their gradients: 24 of the 76 kernels of a layer of
BERT (docs/log.md). On a GPU, a small batch waits for the host to start them. The values are the same.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def cast_by_layer(model: torch.nn.Module) -> None:
    """Let each layer of a model change the trained weights of its Linear modules at once, where autocast is on.

    A layer is an element of a ModuleList. Whole weights must be there when a layer begins: not with zero3 or fsdp2."""
    claimed: set[torch.nn.Module] = set()
    for modules in model.modules():
        for layer in modules if isinstance(modules, torch.nn.ModuleList) else ():
            linears = [each for each in layer.modules() if type(each) is torch.nn.Linear and each not in claimed]
            claimed.update(linears)
            for linear in linears:
                linear.forward = MethodType(_linear, linear)
            if linears:
                _Layer(linears).watch(layer)


class _Layer:
    """The Linear modules of a layer. While it runs, `copies` of each has its weight and bias in 16 bits."""

    def __init__(self, linears: list[torch.nn.Linear]) -> None:
        self._linears = linears
        self._leave()

    def watch(self, layer: torch.nn.Module) -> None:
        """Make copies when the layer begins, and let go of them when it ends, also if by an error."""
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        dtype = autocast_dtype(self._linears[0].weight.device)
        if dtype is None:
            return
        named = [(linear, name) for linear in self._linears for name in ("weight", "bias")]
        wanted = [(linear, name, getattr(linear, name)) for linear, name in named]
        wanted = [each for each in wanted if each[2] is not None and each[2].requires_grad]
        if not wanted:
            return
        copies: tuple[torch.Tensor, ...] = _Cast.apply(dtype, *(weight for _, _, weight in wanted))
        for (linear, name, _), copied in zip(wanted, copies, strict=True):
            linear.copies[name] = copied

    def _leave(self, *_: Any) -> None:
        for linear in self._linears:
            linear.copies = {}


class _Cast(torch.autograd.Function):  # type: ignore[misc]
    """Copies of tensors in another type: one kernel, and one for all gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a copy of each weight, of the given type."""
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return _copies(list(weights), [dtype] * len(weights))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients in the types of the weights; None for weights that were not used."""
        given = [gradient for gradient in gradients if gradient is not None]
        dtypes = [dtype for gradient, dtype in zip(gradients, ctx.dtypes, strict=True) if gradient is not None]
        cast = iter(_copies(given, dtypes) if given else ())
        return (None, *(None if gradient is None else next(cast) for gradient in gradients))


def _copies(tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> tuple[torch.Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return tuple(copies)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast uses on this device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replaces `torch.nn.Linear.forward`."""
    weight, bias = self.copies.get("weight", self.weight), self.copies.get("bias", self.bias)
    return torch.nn.functional.linear(x, weight, bias)
