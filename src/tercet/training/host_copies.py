"""A rank's copy of its state in host memory, from which a thread writes a checkpoint while training continues.

The optimizer changes weights and moments in place, so a checkpoint needs a copy of them. Its memory is kept: the next
checkpoint copies into the same buffers, once the files of this one are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class HostCopies:
    """Copies of tensors, in buffers that are kept. From a GPU they are made beside the steps, on a stream of their own.

    What only a GPU can show is not proven: see docs/log.md."""

    def __init__(self, device: torch.device) -> None:
        """device: of this rank."""
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Any = None
        self._buffers: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Make copies in this block: what the device computed before it is in them."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        yield
        if self._stream is not None:
            self._copied = self._stream.record_event()

    def copy(self, into: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a tensor to host memory. On a GPU, the values are there only after `wait`."""
        assert into.shape == value.shape
        if self._stream is None or not value.is_cuda:
            into.copy_(value)
            return
        with torch.cuda.stream(self._stream):
            into.copy_(value, non_blocking=True)
        value.record_stream(self._stream)  # its memory may be used again after the copy, not before

    def copies(self, named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return copies by name, in the buffers of the checkpoint before where the shapes are the same."""
        values = dict(named)
        missing = {name: v for name, v in values.items() if _kind(self._buffers.get(name)) != _kind(v)}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if name in values}
        self._buffers.update(zip(missing, self.allocate(list(missing.values())), strict=True))
        for name, value in values.items():
            self.copy(self._buffers[name], value)
        return dict(self._buffers)

    def allocate(self, like: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return host tensors of the same shapes and types, in one block: pinned where a GPU copies into it.

        torch rounds each pinned block up to a power of two."""
        starts, num_bytes = [], 0
        for tensor in like:
            starts.append(num_bytes)
            num_bytes += -(-tensor.nbytes // 64) * 64
        block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        return [
            block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, like, strict=True)
        ]

    def before_update(self) -> None:
        """Make the device finish the copies before it changes what they are made of. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def waiter(self) -> Any:
        """Return a function that waits until the copies made so far are in host memory."""
        copied = self._copied
        return (lambda: None) if copied is None else copied.synchronize


def _kind(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype)
