"""Makes torch compute the same bits from the same inputs on the same kind of GPU (`training.deterministic`).

A CPU does so without it. On a GPU, atomic additions come in any order: in mean pooling and in the gradients of gathers
(`index_add`), in the gradients of queries in flash attention, and in products of matrices whose streams share a
workspace. With torch's switch these add up in one order, and an operation without such a way raises an error
(torch 2.13, `torch.use_deterministic_algorithms`).
"""

from __future__ import annotations

import os

# Read by cuBLAS when its first handle is made. torch refuses products of matrices without one of NVIDIA's two values;
# this one keeps eight buffers of 4 MiB (cuBLAS documentation, "Results reproducibility").
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def compute_deterministically(wanted: bool) -> None:
    """Set this process up, if that is wanted, before it computes on a GPU. A workspace that the environment names is
    kept.

    An operation for which torch has no deterministic implementation then raises RuntimeError."""
    if not wanted:
        return
    os.environ.setdefault(*WORKSPACE)
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
