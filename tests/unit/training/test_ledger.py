"""The ledger records which rows each step consumed, on any number of ranks, and resumes from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tercet.errors import CorruptObject, TrainingError
from tercet.training.ledger import Ledger, digest, file_name, read

STEPS = [[0, 5, 7, 9], [1, 2, 3, 4], [6, 8, 10, 11]]


def written(folder: Path, world_size: int, steps: list[list[int]] = STEPS, before: Path | None = None) -> Path:
    """Write the parts of `world_size` ranks, each of which consumes its rows in two micro-batches."""
    folder.mkdir()
    for rank in range(world_size):
        ledger = Ledger()
        if before is not None:
            ledger.load(before, rank)
        for rows in steps:
            own = rows[rank::world_size]
            ledger.consume(own[:1])
            ledger.consume(own[1:])
            ledger.close_step()
        ledger.save(folder, rank, world_size, len(steps) + (0 if before is None else len(read(before))))
    return folder


def test_a_digest_tells_rows_apart() -> None:
    sets = [[], [0], [1], [0, 1], [0, 0], [1, 1], [0, 1, 2], [3], [2**40], *STEPS]
    assert len({digest(rows) for rows in sets}) == len(sets)
    assert digest([3, 1, 2]) == digest(np.array([2, 3, 1]))  # in any order
    assert digest([1, 2]) == (digest([1]) + digest([2])) % 2**64


def test_no_two_of_a_million_rows_have_the_same_hash() -> None:
    digests = {digest([row]) for row in range(0, 10**6, 50)}
    assert len(digests) == 20_000


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_number_of_ranks_changes_nothing(tmp_path: Path, world_size: int) -> None:
    found = read(written(tmp_path / "a", world_size))
    assert found.tolist() == [digest(rows) for rows in STEPS]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4), (2, 2)])
def test_a_run_that_resumes_with_another_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    first = written(tmp_path / "first", before, STEPS[:2])
    both = written(tmp_path / "second", after, STEPS[2:], before=first)
    assert read(both).tolist() == [digest(rows) for rows in STEPS]


def test_rows_of_an_unfinished_step_are_not_recorded(tmp_path: Path) -> None:
    first = written(tmp_path / "first", 1, STEPS[:1])
    ledger = Ledger()
    ledger.consume([99])
    ledger.load(first, 0)
    ledger.consume(STEPS[1])
    ledger.close_step()
    ledger.save(tmp_path, 0, 1, 2)
    assert read(tmp_path).tolist() == [digest(rows) for rows in STEPS[:2]]


@pytest.mark.parametrize("num_steps", [0, 2, 4])
def test_a_ledger_of_another_length_is_not_written(tmp_path: Path, num_steps: int) -> None:
    ledger = Ledger()
    for rows in STEPS:
        ledger.consume(rows)
        ledger.close_step()
    with pytest.raises(TrainingError, match=f"rows of 3 steps, but {num_steps} were trained"):
        ledger.save(tmp_path, 0, 1, num_steps)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_different_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", 2)
    (folder / file_name(1, 2)).unlink()
    with pytest.raises(CorruptObject, match="the ledger cannot be read"):
        read(folder)
    np.save(folder / file_name(1, 2), np.zeros(2, dtype=np.uint64))
    with pytest.raises(CorruptObject, match="the ledger cannot be read"):
        read(folder)
    (folder / file_name(1, 2)).write_bytes(b"no array")
    with pytest.raises(CorruptObject, match="the ledger cannot be read"):
        read(folder)
    with pytest.raises(CorruptObject, match="the ledger cannot be read"):
        read(tmp_path)
