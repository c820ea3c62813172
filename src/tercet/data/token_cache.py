"""Token ids of a split on this machine: made once for each shard and tokenizer, memory-mapped.

    <cache>/tokens/<key>/<sha256>.<xxh3>.ids    the tokens of a shard's texts, and where each text begins
    <cache>/tokens/<key>/<sha256>.lock          held while the file is made

`key` stands for the tokenizer and the columns, `sha256` for the shard. So versions of a dataset share the files of the
shards that they have in common, and a changed tokenizer has files of its own. The rules are those of shards (`cache`):
if several processes need a file at once, one makes it; the hash in the name (64-bit XXH3) is compared each time a file
is opened; a file that is damaged, or left behind by a killed process, is made again.

A file holds the ids of all texts, row by row and in a row column by column, and then the bounds of the texts: int64,
shape (num_rows * num_columns + 1,). Ids have 16 bits where the vocabulary allows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tercet.data.cache import default_cache_dir, hash_of
from tercet.data.manifest import Shard
from tercet.data.order import Rows
from tercet.errors import TercetError
from tercet.storage.base import expand_home, local_errors

logger = logging.getLogger("tercet")

FOLDER = "tokens"
BOUND_BYTES = 8


class Tokens(NamedTuple):
    """Tokens of some texts, one text after the other."""

    ids: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.integer[Any]]
    """Tokens of each text."""


Tokenize = Callable[[int, int], Iterator[Tokens]]
"""The rows of a split, from the first number to before the second → their tokens, in blocks of whole rows. The texts
of a row follow each other, column by column."""


def has_tokens(cache_dir: Path | None) -> bool:
    """Return whether this machine has cached any token ids."""
    return (expand_home(cache_dir or default_cache_dir()) / FOLDER).is_dir()


class TokenCache:
    """The tokens of a split's texts, as far as this machine has them."""

    def __init__(
        self, cache_dir: Path | None, key: str, shards: Sequence[Shard], num_columns: int, max_id: int
    ) -> None:
        """key: of the tokenizer and the columns. shards: of the split, in order. max_id: the largest token id."""
        self._folder = expand_home(cache_dir or default_cache_dir()).resolve() / FOLDER / key
        self._shards, self._num_columns = tuple(shards), num_columns
        self._type = np.dtype(np.uint16 if max_id < 2**16 else np.uint32)
        self._first_rows = np.cumsum([0, *(shard.num_rows for shard in shards)])
        self._files: list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | None] = [None] * len(shards)

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return len(self._shards)

    @property
    def is_complete(self) -> bool:
        """Whether the tokens of all shards are mapped."""
        return None not in self._files

    def open(self, number: int) -> bool:
        """Map the file of a shard if this machine has it. Return whether it is mapped."""
        if self._files[number] is None:
            path = self._whole(self._shards[number])
            if path is not None:
                self._files[number] = self._mapped(path, self._shards[number])
        return self._files[number] is not None

    def make(self, number: int, tokenize: Tokenize) -> bool:
        """Make and map the file of a shard. Return False if another process is just making it.

        Raises DiskFull and other errors of the operating system as tercet errors."""
        from filelock import FileLock, Timeout

        shard, first = self._shards[number], int(self._first_rows[number])
        with local_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self._folder / f"{shard.sha256}.lock", timeout=0):
                if not self.open(number):
                    partial = self._folder / f"{shard.sha256}.partial"
                    for stale in self._folder.glob(f"{shard.sha256}.*"):
                        if stale.suffix != ".lock":
                            stale.unlink()
                    try:
                        with local_errors(partial):
                            self._write(partial, tokenize(first, first + shard.num_rows), shard)
                            partial.rename(self._folder / f"{shard.sha256}.{hash_of(partial)}.ids")
                    finally:
                        partial.unlink(missing_ok=True)
                    return self.open(number)
        except Timeout:
            return False
        return True

    def take(self, rows: Rows) -> list[Tokens] | None:
        """Return the tokens of each column of the given rows; None if a shard of theirs is not mapped.

        Copies with numpy, without a loop over texts or tokens. The ids are int64."""
        shards = np.searchsorted(self._first_rows, rows, side="right") - 1
        by_shard = np.argsort(shards, kind="stable")
        used, begins = np.unique(shards[by_shard], return_index=True)
        files = [file for number in used.tolist() if (file := self._files[number]) is not None]
        if len(files) < len(used):
            return None
        # Texts by shard, row and column; and the place of each among all texts, column by column.
        columns, cuts = np.arange(self._num_columns), (begins[1:] * self._num_columns).tolist()
        texts = ((rows - self._first_rows[shards])[by_shard, None] * self._num_columns + columns).ravel()
        places = (by_shard[:, None] + columns * len(rows)).ravel()
        pairs = list(zip(files, pairwise([0, *cuts, len(texts)]), strict=True))
        starts = np.concatenate([bounds[texts[start:stop]] for (_, bounds), (start, stop) in pairs])
        texts += 1
        counts = np.concatenate([bounds[texts[start:stop]] for (_, bounds), (start, stop) in pairs]) - starts
        lengths = np.empty_like(counts)
        lengths[places] = counts
        ends = np.cumsum(lengths)
        own_ends = np.cumsum(counts)
        within = np.arange(ends[-1]) - np.repeat(own_ends - counts, counts)
        sources = np.repeat(starts, counts) + within
        token_cuts = [0, *own_ends[[cut - 1 for cut in cuts]].tolist(), len(sources)]
        ids = np.empty(len(sources), np.int64)
        ids[np.repeat((ends - lengths)[places], counts) + within] = np.concatenate(
            [own[sources[start:stop]] for (own, _), (start, stop) in zip(files, pairwise(token_cuts), strict=True)]
        )
        column_ends = ends[len(rows) - 1 :: len(rows)]
        return [
            Tokens(*column)
            for column in zip(np.split(ids, column_ends[:-1]), lengths.reshape(-1, len(rows)), strict=True)
        ]

    def _whole(self, shard: Shard) -> Path | None:
        paths = self._folder.glob(f"{shard.sha256}.*.ids")
        return next((path for path in paths if path.name == f"{shard.sha256}.{hash_of(path)}.ids"), None)

    def _mapped(self, path: Path, shard: Shard) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        num_bounds = shard.num_rows * self._num_columns + 1
        memory = np.asarray(np.memmap(path, np.uint8, mode="r"))  # slices of a plain array cost less
        bounds = memory[len(memory) - num_bounds * BOUND_BYTES :].view(np.int64)
        return memory[: int(bounds[-1]) * self._type.itemsize].view(self._type), bounds

    def _write(self, path: Path, blocks: Iterator[Tokens], shard: Shard) -> None:
        lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, np.int64)]
        with path.open("wb") as file:
            for block in blocks:
                if block.ids.size and int(block.ids.max()) >= 2 ** (8 * self._type.itemsize):
                    raise TercetError(f"token {int(block.ids.max())} is not in the tokenizer's vocabulary")
                file.write(block.ids.astype(self._type).tobytes())
                lengths.append(block.lengths.astype(np.int64))
            bounds = np.cumsum(np.concatenate(lengths))
            if len(bounds) != shard.num_rows * self._num_columns + 1:
                raise TercetError(f"{path}: {len(bounds) - 1:,} texts instead of those of {shard.num_rows:,} rows")
            file.write(bytes(-file.tell() % BOUND_BYTES))
            file.write(bounds.tobytes())
