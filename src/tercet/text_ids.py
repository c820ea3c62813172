"""Which texts of a dataset are equal: eight bytes for each, on this machine's disk, memory-mapped.

    <cache>/text_ids/<fingerprint>.<hash>.npy    shape (num_rows, num_columns); `hash` is of its bytes

Made once for a dataset version and a choice of its rows; all processes of a machine share it. It decides the order of
rows, which must be the same on every machine, so a file that is not what its name says is made again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tercet.dataset import hash_of, whole
from tercet.sampling import Rows, TextIds

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 10_000


def text_ids(rows: Dataset, cache_dir: Path) -> TextIds:
    """Equal numbers for equal texts of `rows`, in all of its columns. Costs memory only for the rows asked for.

    The numbers are hashes. Of a billion texts, two that differ have the same one with probability 0.03 (XXH3, 64 bits);
    two rows would then be kept apart for nothing."""
    from filelock import FileLock

    folder = cache_dir.expanduser().resolve() / "text_ids"
    folder.mkdir(parents=True, exist_ok=True)
    name = rows._fingerprint
    with FileLock(folder / f"{name}.lock"):
        path = whole(folder, name, "npy") or _write(rows, folder, name)
    table: npt.NDArray[np.int64] = np.load(path, mmap_mode="r")

    def of(numbers: Rows) -> npt.NDArray[np.int64]:
        return np.asarray(table[numbers])

    return of


def _write(rows: Dataset, folder: Path, name: str) -> Path:
    import xxhash

    partial = folder / f"{name}.partial"
    shape = (len(rows), len(rows.column_names))
    with partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for batch in rows.iter(batch_size=ROWS_AT_ONCE):
            columns = [
                [xxhash.xxh3_64_intdigest(text.encode()) for text in batch[column]] for column in rows.column_names
            ]
            file.write(np.array(columns, dtype=np.uint64).T.astype("<u8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return partial.rename(folder / f"{name}.{hash_of(partial)}.npy")
