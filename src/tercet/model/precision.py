"""Precisions that a device has, and computing in one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

Named = Literal["fp32", "tf32", "bf16"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def activations_dtype(precision: str) -> torch.dtype:
    """Return the type of the activations that a precision computes with; tf32 is a way to multiply fp32."""
    return _AUTOCAST.get(precision, torch.float32)


def has_bf16(device: str) -> bool:
    """Return whether a device computes in bf16 itself. Every CPU does, though not every one faster than in fp32."""
    return torch.device(device).type == "cpu" or bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_tf32(device: str) -> bool:
    """Return whether a device is an NVIDIA GPU with tf32: compute capability 8.0, Ampere, or later."""
    if torch.device(device).type == "cpu" or torch.version.hip is not None:
        return False
    return bool(torch.cuda.get_device_capability(device) >= (8, 0))


def default_precision(device: str) -> Named:
    """Return the precision of a recipe that names none: on a GPU bf16, else tf32, whichever it has first; else fp32."""
    if torch.device(device).type == "cpu":
        return "fp32"
    return "bf16" if has_bf16(device) else "tf32" if has_tf32(device) else "fp32"


@contextlib.contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Make the forward passes inside compute in `precision` on a GPU. On a CPU, nothing changes."""
    if device.type == "cpu":
        yield
    elif precision in _AUTOCAST:
        with torch.autocast(device.type, _AUTOCAST[precision]):
            yield
    else:
        with products_in(precision):
            yield


@contextlib.contextmanager
def computing_exactly(device: torch.device) -> Iterator[None]:
    """Make products of fp32 inside compute in fp32, whatever the training has switched on."""
    if device.type == "cpu":
        yield
    else:
        with torch.autocast(device.type, enabled=False), products_in("fp32"):
            yield


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Make a GPU's products of fp32 compute in tf32 if that is the precision, else in fp32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
