"""Copies of a rank's state stay as they were while the state changes, in memory that is used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.artifacts.tensor_file import BLOCK_BYTES, write_tensors
from tercet.storage.base import sha256_of
from tercet.training.host_copies import HostCopies


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of 0, 1 and 2 dimensions, one that is empty, and one that is a view of another."""
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(3, 1000, generator=draw)
    return {
        "w|step": torch.tensor(float(seed)),
        "w|exp_avg|0": whole[1],
        "empty|exp_avg|0": torch.zeros(0, 3),
        "w|exp_avg_sq|0": torch.randn(7, 5, generator=draw),
    }


def test_a_copy_does_not_change_with_what_was_copied() -> None:
    values = state()
    copies = HostCopies(torch.device("cpu")).copies(values.items())
    for value in values.values():
        value.add_(1.0)
    assert all(torch.equal(copies[name], value) for name, value in state().items())
    assert all(copy.is_contiguous() for copy in copies.values())


def test_the_next_copies_use_the_same_memory() -> None:
    kept = HostCopies(torch.device("cpu"))
    first = {name: copy.data_ptr() for name, copy in kept.copies(state().items()).items()}
    again = kept.copies(state(1).items())
    assert {name: copy.data_ptr() for name, copy in again.items()} == first
    assert all(torch.equal(again[name], value) for name, value in state(1).items())


def test_state_of_another_shape_gets_new_memory() -> None:
    kept = HostCopies(torch.device("cpu"))
    kept.copies(state().items())
    grown = {**state(1), "w|exp_avg|0": torch.ones(5), "new|step": torch.tensor(3.0)}
    del grown["empty|exp_avg|0"]
    again = kept.copies(grown.items())
    assert again.keys() == grown.keys()
    assert all(torch.equal(again[name], value) for name, value in grown.items())


@pytest.mark.parametrize("size", [0, 1, 5, BLOCK_BYTES // 4, BLOCK_BYTES // 4 + 3])
def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path, size: int) -> None:
    tensors = {**state(), "größe|exp_avg|0": torch.arange(size, dtype=torch.float32), 'a"b': torch.ones(2, 2)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "expected")
    sha256 = write_tensors(tensors, tmp_path / "written")
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()
    assert sha256 == sha256_of(tmp_path / "written")
    assert torch.equal(load_file(tmp_path / "written")["größe|exp_avg|0"], tensors["größe|exp_avg|0"])
