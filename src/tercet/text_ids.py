"""Which texts of a dataset are equal: a number for each, computed for the rows that are asked for.

They are kept nowhere: the order of rows asks for a block of some 30,000 at a time, which is numbered in a fraction of a
second, and trained on in minutes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tercet.sampling import Rows, TextIds

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def text_ids(rows: Dataset) -> TextIds:
    """Equal numbers for equal texts of `rows`, in all of its columns, which have no nulls.

    The numbers are hashes. Of a billion texts, two that differ have the same one with probability 0.03 (XXH3, 64 bits);
    two rows would then be kept apart for nothing."""
    columns = rows.data.columns
    chosen = None if rows._indices is None else rows._indices.column(0)  # of a selection

    def of(numbers: Rows) -> npt.NDArray[np.int64]:
        stored = numbers if chosen is None else chosen.take(numbers).to_numpy()
        in_order = np.argsort(stored)
        ids = np.empty((len(columns), len(numbers)), dtype=np.uint64)
        for of_column, column in zip(ids, columns, strict=True):
            of_column[in_order] = _hashes(column, stored[in_order])
        return ids.view(np.int64).T

    return of


def _hashes(column: pa.ChunkedArray, numbers: Rows) -> list[int]:
    """Of the texts with these numbers, which ascend. Reads them where they are mapped: `take` of pyarrow 26 copies the
    whole column into memory first."""
    import xxhash

    hashes: list[int] = []
    first = 0
    for chunk in column.chunks:
        begin, end = np.searchsorted(numbers, (first, first + len(chunk)))
        if begin < end:
            _, offsets, data = chunk.buffers()
            bounds = np.frombuffer(offsets, np.int32)[chunk.offset :]
            here, texts = numbers[begin:end] - first, memoryview(data)
            pairs = zip(bounds[here].tolist(), bounds[here + 1].tolist(), strict=True)
            hashes += [xxhash.xxh3_64_intdigest(texts[start:stop]) for start, stop in pairs]
        first += len(chunk)
    return hashes
