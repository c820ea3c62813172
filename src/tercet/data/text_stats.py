"""Compute what `order` needs to know about texts: which are equal, and about how many tokens a row has.

Computed for the given rows only, and not stored. A block of about 30,000 rows takes a fraction of a second here, and
minutes of training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tercet.data.order import Rows, RowTokens, TextIds

if TYPE_CHECKING:
    from datasets import Dataset

# Estimated cost in sixteenths of a token: a punctuation mark is a token; a word costs _PER_WORD, and more for each of
# its bytes. Characters of three UTF-8 bytes mostly belong to scripts without spaces, so their first byte costs more.
# Measured in docs/decisions/0002-order-is-global.md.
_PER_MARK, _PER_LETTER, _PER_WIDE_LETTER, _PER_WORD = 16, 2, 5, 10


MAX_TOKENS = 2**31
"""No text has more. A tokenizer without a limit says 1e30, which no 64-bit number holds."""


def _cost_of(byte: int) -> int:
    if byte >= 0x80:
        return _PER_WIDE_LETTER if byte >= 0xE0 else _PER_LETTER
    if chr(byte).isalnum():
        return _PER_LETTER
    return 0 if byte <= ord(" ") else _PER_MARK


_BYTE_COSTS = bytes(_cost_of(byte) for byte in range(256))


def text_ids(rows: Dataset) -> TextIds:
    """Return a function that numbers the texts of given rows: equal numbers for equal texts, in all columns of `rows`.

    There must be no nulls. The numbers are hashes (64-bit XXH3). The probability that two different texts among a
    billion share one is 0.03; their rows would then be kept apart needlessly."""
    import xxhash

    def hashes(texts: Iterator[memoryview]) -> npt.NDArray[np.int64]:
        return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64).view(np.int64)

    return _numbers_of_texts(rows, hashes)


def estimated_tokens(rows: Dataset, max_tokens: int | None) -> RowTokens:
    """Return a function that estimates the tokens of given rows, in sixteenths of a token: the sum over a row's texts.

    Each text counts at most `max_tokens`; a null counts 0."""
    tokens = _numbers_of_texts(rows, _tokens)
    limit = np.inf if max_tokens is None else 16.0 * max_tokens  # 1e30 for a tokenizer without a limit
    return lambda numbers: np.minimum(tokens(numbers), limit).sum(axis=1).astype(np.int64)


def estimated_tokens_of(texts: Iterable[str], max_tokens: int | None) -> npt.NDArray[np.int64]:
    """Estimate the tokens of each text, with the two at its ends: shape (num_texts,). At most `max_tokens` each."""
    sixteenths = _tokens(memoryview(text.encode()) for text in texts)
    tokens = -(-sixteenths // 16) + 2
    return tokens if max_tokens is None else np.minimum(tokens, np.int64(min(max_tokens, MAX_TOKENS)))


def _tokens(texts: Iterator[memoryview]) -> npt.NDArray[np.int64]:
    """Estimate the tokens of each text, in sixteenths of a token: shape (num_texts,)."""
    parts: list[bytes | memoryview] = [b"", *texts]
    tokens = np.frombuffer(bytearray(b" ".join(parts).translate(_BYTE_COSTS)), np.uint8)
    in_word = (tokens > 0) & (tokens < _PER_MARK)
    tokens[1:] += (in_word[1:] & ~in_word[:-1]) * np.uint8(_PER_WORD)
    # Each text is summed together with the space before it, which costs nothing.
    return np.add.reduceat(tokens, np.cumsum([len(part) + 1 for part in parts[:-1]]) - 1, dtype=np.int64)


def _numbers_of_texts(
    rows: Dataset, numbers_of: Callable[[Iterator[memoryview]], npt.NDArray[np.int64]]
) -> Callable[[Rows], npt.NDArray[np.int64]]:
    """Return a function that applies `numbers_of` to the texts of given rows: (num_rows,) → (num_rows, num_columns).

    Reads the texts directly from the mapped buffers, because `take` of pyarrow 26 copies the whole column."""
    columns: list[Any] = rows.data.columns
    chosen = None if rows._indices is None else rows._indices.column(0).to_numpy()  # set if rows were selected
    first_rows = [np.cumsum([0, *map(len, texts.chunks)]) for texts in columns]

    @functools.cache
    def mapped(column: int, chunk: int) -> tuple[npt.NDArray[np.int32], memoryview]:
        part = columns[column].chunk(chunk)
        _, bounds, texts = part.buffers()
        return np.frombuffer(bounds, np.int32)[part.offset :], memoryview(texts or b"")

    def of(numbers: Rows) -> npt.NDArray[np.int64]:
        stored, places = np.unique(numbers if chosen is None else chosen[numbers], return_inverse=True)
        stored = stored.astype(np.int64)
        numbers_by_column = []
        for number, first in enumerate(first_rows):
            chunks, begins = np.unique(np.searchsorted(first, stored, side="right") - 1, return_index=True)
            texts: list[Iterator[memoryview]] = []
            for chunk, own in zip(chunks.tolist(), np.split(stored, begins[1:]), strict=False):
                (bounds, mapped_texts), here = mapped(number, chunk), own - first[chunk]
                slices = map(slice, bounds[here].tolist(), bounds[here + 1].tolist())
                texts.append(map(mapped_texts.__getitem__, slices))
            numbers_by_column.append(numbers_of(itertools.chain.from_iterable(texts))[places])
        return np.stack(numbers_by_column, axis=1)

    return of
