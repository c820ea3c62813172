"""Writes safetensors files and hashes them as it writes: no copy of the tensors, and no second look at the file.

8 bytes    length of the header, little-endian
header     JSON: for each tensor its dtype, shape, and first and last byte; padded with spaces to a multiple of 8
tensors    the bytes of each, in the order of the header
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1024 * 1024
"""What is written is hashed while the processor's cache still has it."""


def write_tensors(tensors: Mapping[str, Any], path: Path) -> str:
    """Write contiguous fp32 tensors in host memory to a file, and return its sha256.

    The file has the same bytes as one of `safetensors.torch.save_file`."""
    names = sorted(tensors)
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        end = position + tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for data in (len(text).to_bytes(8, "little"), text, *(_bytes(tensors[name]) for name in names)):
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                while block:  # an unbuffered file may write less than it is given
                    digest.update(block[: (num_written := file.write(block))])
                    block = block[num_written:]
    return digest.hexdigest()


def _bytes(tensor: Any) -> memoryview | bytes:
    assert tensor.is_contiguous()
    return memoryview(tensor.numpy()).cast("B") if tensor.numel() else b""
