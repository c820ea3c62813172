"""What the order of rows asks of their texts: which are equal, and about how many tokens a row has.

Computed for the rows that are asked for, and kept nowhere. A block of some 30,000 rows is looked at in a fraction of a
second and trained on in minutes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tercet.data.order import Rows, RowTokens, TextIds

if TYPE_CHECKING:
    from datasets import Dataset

# Of each byte, in sixteenths of a token: a mark is one, and a letter of a word goes on with the one before. Letters of
# three bytes are those of scripts without spaces. Measured in docs/decisions/0002-order-is-global.md.
_OF_MARK, _OF_LETTER, _OF_WIDE_LETTER, _OF_WORD = 16, 2, 5, 10


def _of_byte(byte: int) -> int:
    if byte >= 0x80:
        return _OF_WIDE_LETTER if byte >= 0xE0 else _OF_LETTER
    if chr(byte).isalnum():
        return _OF_LETTER
    return 0 if byte <= ord(" ") else _OF_MARK


_OF_BYTE = bytes(_of_byte(byte) for byte in range(256))


def text_ids(rows: Dataset) -> TextIds:
    """Equal numbers for equal texts of `rows`, in all of its columns, which have no nulls.

    The numbers are hashes. Of a billion texts, two that differ have the same one with probability 0.03 (XXH3, 64 bits);
    two rows would then be kept apart for nothing."""
    import xxhash

    def hashes(texts: Iterator[memoryview]) -> npt.NDArray[np.int64]:
        return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64).view(np.int64)

    return _numbers_of_texts(rows, hashes)


def estimated_tokens(rows: Dataset, max_tokens: int | None) -> RowTokens:
    """About how many tokens there are to compute on, in sixteenths: of all texts of a row together, of each no more
    than `max_tokens`. A text that is null has none."""
    tokens = _numbers_of_texts(rows, _tokens)
    most = np.inf if max_tokens is None else 16.0 * max_tokens  # a tokenizer without a limit says 1e30
    return lambda numbers: np.minimum(tokens(numbers), most).sum(axis=1).astype(np.int64)


def _tokens(texts: Iterator[memoryview]) -> npt.NDArray[np.int64]:
    """Of each text, in sixteenths."""
    parts: list[bytes | memoryview] = [b"", *texts]
    tokens = np.frombuffer(bytearray(b" ".join(parts).translate(_OF_BYTE)), np.uint8)
    in_word = (tokens > 0) & (tokens < _OF_MARK)
    tokens[1:] += (in_word[1:] & ~in_word[:-1]) * np.uint8(_OF_WORD)
    # The space before a text is counted with it.
    return np.add.reduceat(tokens, np.cumsum([len(part) + 1 for part in parts[:-1]]) - 1, dtype=np.int64)


def _numbers_of_texts(
    rows: Dataset, numbers_of: Callable[[Iterator[memoryview]], npt.NDArray[np.int64]]
) -> Callable[[Rows], npt.NDArray[np.int64]]:
    """A number for each text of the rows that are asked for: shape (num_rows,) → (num_rows, num_columns).

    Texts are read where they are mapped: `take` of pyarrow 26 copies the whole column."""
    columns: list[Any] = rows.data.columns
    chosen = None if rows._indices is None else rows._indices.column(0).to_numpy()  # of a selection
    first_rows = [np.cumsum([0, *map(len, texts.chunks)]) for texts in columns]

    @functools.cache
    def mapped(column: int, chunk: int) -> tuple[npt.NDArray[np.int32], memoryview]:
        part = columns[column].chunk(chunk)
        _, bounds, texts = part.buffers()
        return np.frombuffer(bounds, np.int32)[part.offset :], memoryview(texts or b"")

    def of(numbers: Rows) -> npt.NDArray[np.int64]:
        stored, places = np.unique(numbers if chosen is None else chosen[numbers], return_inverse=True)
        stored = stored.astype(np.int64)
        found = []
        for number, first in enumerate(first_rows):
            chunks, begins = np.unique(np.searchsorted(first, stored, side="right") - 1, return_index=True)
            texts: list[Iterator[memoryview]] = []
            for chunk, own in zip(chunks.tolist(), np.split(stored, begins[1:]), strict=False):
                (bounds, mapped_texts), here = mapped(number, chunk), own - first[chunk]
                of_texts = map(slice, bounds[here].tolist(), bounds[here + 1].tolist())
                texts.append(map(mapped_texts.__getitem__, of_texts))
            found.append(numbers_of(itertools.chain.from_iterable(texts))[places])
        return np.stack(found, axis=1)

    return of
