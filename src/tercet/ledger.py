"""Which rows each optimizer step consumed, as one number a step, committed with the checkpoint.

    ledger-00000-of-00002.npy    of rank 0 of 2: shape (num_steps,), uint64, from step 0 of the run on

A step's number is the sum, modulo 2^64, of a hash of each row that went into it; ranks add up. So it does not depend on
the number of workers, which may change on the way, and takes 8 bytes a step and rank. It is written down where rows are
trained on, not where their order is made: `verify.py` holds the two against each other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tercet.errors import CorruptObject, TrainingError
from tercet.sampling import splitmix64

Digests = npt.NDArray[np.uint64]


def file_name(rank: int, world_size: int) -> str:
    """Of one rank's file."""
    return f"ledger-{rank:05d}-of-{world_size:05d}.npy"


def digest(rows: npt.ArrayLike) -> int:
    """The sum of a hash of each row, modulo 2^64. Rows that were used twice count twice."""
    # Zero is a fixed point of the mixing function.
    hashes = splitmix64(np.asarray(rows, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return int(hashes.sum(dtype=np.uint64))


class Ledger:
    """One rank's part: open for the step that runs, closed for those before."""

    def __init__(self) -> None:
        self._closed: list[int] = []
        self._open = 0

    def consume(self, rows: list[int]) -> None:
        """These rows went into the step that runs."""
        self._open = (self._open + digest(rows)) % 2**64

    def close_step(self) -> None:
        """The step that ran has ended."""
        self._closed.append(self._open)
        self._open = 0

    def save(self, folder: Path, rank: int, world_size: int, num_steps: int) -> None:
        """Write this rank's part. Raises TrainingError unless it has `num_steps` steps."""
        if len(self._closed) != num_steps:
            raise TrainingError(
                f"the ledger has the rows of {len(self._closed)} steps, but {num_steps} were trained",
                hint="this is a fault of tercet or of the installed transformers",
            )
        np.save(folder / file_name(rank, world_size), np.array(self._closed, dtype=np.uint64))

    def load(self, folder: Path, rank: int) -> None:
        """Go on from a checkpoint, perhaps of another number of ranks: rank 0 takes what all of them wrote."""
        digests = read(folder)
        self._closed = digests.tolist() if rank == 0 else [0] * len(digests)
        self._open = 0


def read(folder: Path) -> Digests:
    """The number of each step, of all ranks together: shape (num_steps,).

    Raises CorruptObject when a rank's file is missing, damaged, or of another length than the others."""
    paths = sorted(folder.glob("ledger-*-of-*.npy"))
    world_size = int(paths[0].stem.rpartition("-")[2]) if paths else 1
    try:
        parts = [np.load(folder / file_name(rank, world_size)) for rank in range(world_size)]
        total: Digests = np.stack(parts).sum(axis=0, dtype=np.uint64)
    except (OSError, ValueError) as error:
        raise CorruptObject(f"{folder}: the ledger cannot be read: {error}", hint="use another checkpoint") from error
    return total
