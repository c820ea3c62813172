"""The memory of the GPUs that workers will use: of this machine's, or of Ray's types of accelerator."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable

QUERY_SECONDS = 10

# GiB by Ray 2.60's names (ray.util.accelerators), from NVIDIA's datasheets. Where one name stands for cards of several
# sizes, the smallest.
MEMORY_GIB = {
    "V100": 16,
    "T4": 16,
    "L4": 24,
    "L40S": 48,
    "A10G": 24,
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "H20": 96,
    "B200": 180,
}


def bytes_of_this_machine() -> int | None:
    """Return the memory of the smallest GPU that this process may use; None if there is none, or none is known.

    Asks NVIDIA's driver through `nvidia-smi`, because torch is not to be loaded here. GPUs that CUDA_VISIBLE_DEVICES
    hides by their numbers are not counted."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
        sizes = dict(line.split(",") for line in output.splitlines() if line.strip())
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and all(part.strip().isdecimal() for part in visible.split(",")):
            sizes = {
                index: size for index, size in sizes.items() if index.strip() in map(str.strip, visible.split(","))
            }
        elif visible in ("", "-1"):
            return None
        return min(int(size) for size in sizes.values()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, no GPU, or "[N/A]"
        return None


def bytes_of_types(names: Iterable[str]) -> int | None:
    """Return the memory of the smallest of these GPUs, by Ray's names; None if one is unknown."""
    sizes = [MEMORY_GIB.get(name.removeprefix("NVIDIA-").removeprefix("TESLA-")) for name in names]
    known = [size for size in sizes if size is not None]
    return min(known) * 2**30 if known and len(known) == len(sizes) else None
