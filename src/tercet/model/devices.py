"""The device on which this process computes."""

from __future__ import annotations

import torch

from tercet.config.sections import WorkersConfig


def own_device(workers: WorkersConfig) -> str:
    """Return the device for a model that this process loads alone: `cuda`, the process's own GPU, or `cpu`.

    Never a GPU where `workers.use_gpu` is false: Ray then reserves none, but hides none either."""
    return "cuda" if workers.use_gpu is not False and torch.cuda.is_available() else "cpu"
