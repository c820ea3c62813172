"""A training step on the `meta` device, as on a GPU in 16 bits: what would wait there for a value raises here.

torch has no autocast for that device, and a CPU build cannot pretend to have CUDA; so the rules of CUDA's autocast are
applied to the functions that the models call. Dropout is one kernel, as it is there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

META = torch.device("meta")

# From "CUDA Ops that can autocast" in torch's documentation of torch.amp, as far as encoders and losses call them.
IN_16_BITS = {
    functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
}
IN_32_BITS = {
    functional.layer_norm,
    functional.softmax,
    functional.log_softmax,
    functional.cross_entropy,
    functional.normalize,
    functional.cosine_similarity,
    functional.softplus,
    torch.softmax,
    torch.cosine_similarity,
    torch.norm,
    torch.pow,
    torch.rsqrt,
    torch.exp,
    torch.sum,
    torch.Tensor.softmax,
    torch.Tensor.norm,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.Tensor.rsqrt,
    torch.Tensor.exp,
    torch.Tensor.sum,
}


class CudaAutocast(TorchFunctionMode):  # type: ignore[misc]
    """torch.autocast("cuda", dtype), for tensors on the meta device. Weights in 16 bits are kept while it lasts."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func in IN_16_BITS:
            args, kwargs = tree_map(self._narrow, (args, kwargs))
        elif func in IN_32_BITS:
            args, kwargs = tree_map(_widen, (args, kwargs))
        return func(*args, **kwargs)

    def _narrow(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == self._dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self._dtype)
        if id(x) not in self._weights:
            self._weights[id(x)] = (x.to(self._dtype), x)  # with the weight, so that its id is not used again
        return self._weights[id(x)][0]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    assert not inplace
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


class KernelCount(TorchDispatchMode):  # type: ignore[misc]
    """Counts operators that run a kernel on a GPU, in the forward and in the backward pass.

    Copies and changes of type count; views and memory that is only allocated do not. Each operator counts once, also
    where its kernel is several in truth, as in the backward passes of attention and layer norm."""

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        if not is_view and name not in self.ALLOCATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
