"""Token ids of the rows to train on, from the cache of this machine, so that a batch is a slice of it.

While files of the cache are missing, batches that need them are tokenized as before, and a thread makes the files. So
training starts at once, and ids are the same either way: the cache holds what the trainer's own collator returned.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from tercet.data.manifest import Shard
from tercet.data.order import Rows
from tercet.data.token_cache import TokenCache, Tokenize, Tokens
from tercet.errors import first_line
from tercet.model.row import row_features
from tercet.planning.rows import PlannedRows

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

# Changes with the format of the files, or with what is put into them.
FORMAT = 1
# Rows that are tokenized at once, for a file of the cache.
ROWS_PER_BLOCK = 256
# Opening a file reads it. Training does not wait longer than this for files that exist.
MAX_OPEN_SECONDS = 0.5
POLL_SECONDS = 1.0

# Texts on which tokenizers differ: cases, accents (composed or not), scripts, controls, special tokens, length.
PROBES = (
    *("", " ", "a", "Hello, World!", "don't  stop\tnow\n", "ÄÖÜß e\u0301 \u00e9", "naïve №5 ½", "中文字符和日本語"),
    *(
        "العربية עברית",
        "हिन्दी ไทย",
        "👩‍👩‍👧 🇩🇪",
        "\u200b\u200d\ufeff",
        "\x00\x07",
        "1234567890 3.14e-5",
        "</s><s>[CLS][SEP]",
    ),
    *(
        "[MASK] <mask> [UNK] <unk> <pad>",
        "https://example.org/a?b=c#d",
        "snake_case CamelCase",
        "x" * 300,
        "word " * 9000,
    ),
)

NOT_CACHED = "token ids are not cached, and batches are tokenized as they are needed: %s"

logger = logging.getLogger("tercet")


@dataclass(frozen=True)
class TokenSource:
    """Where the trainer may find token ids, and whether it makes them."""

    parts: Sequence[PlannedRows]
    shards: Sequence[Sequence[Shard]]
    """Shards of the train split of each part."""
    cache_dir: Path
    is_made: bool
    """Whether missing files are made."""


def open_token_ids(source: TokenSource, collator: Any, model: SentenceTransformer) -> TokenIds | None:
    """Return token ids as `TokenIds` takes them; None, with a warning, for a tokenizer that cannot be written to files.

    A run that has no use for the cache otherwise must not end because of it."""
    try:
        return TokenIds(source, collator, model)
    except Exception as error:  # noqa: BLE001 - the tokenizer may be code of the model
        logger.warning(NOT_CACHED, first_line(error))
        return None


class TokenIds:
    """Collates rows from the cache. Files that exist are opened here; a thread opens or makes the others."""

    def __init__(self, source: TokenSource, collator: Any, model: SentenceTransformer) -> None:
        """collator: of the trainer, a dataclass with `preprocess_fn`. model: makes rows without padding."""
        self._is_made = source.is_made
        make = own_collator(collator, model) if source.is_made else None
        tokenizer_key = digest_of_tokenizer(model.tokenizer)
        self._parts = [
            _Part(part, shards, source.cache_dir, tokenizer_key, collator, make, len(model.tokenizer))
            for part, shards in zip(source.parts, source.shards, strict=True)
        ]
        self._ends = np.cumsum([len(part.rows) for part in source.parts])
        self._is_stopped, self._is_training = threading.Event(), threading.Event()
        began = time.monotonic()
        files = [(part, number) for part in self._parts for number in range(part.cache.num_shards)]
        self._missing = [
            (part, number)
            for part, number in files
            if time.monotonic() - began > MAX_OPEN_SECONDS or not part.cache.open(number)
        ]
        self._thread: threading.Thread | None = None
        if self._missing:
            self._thread = threading.Thread(target=self._complete, name="tercet-token-cache", daemon=True)
            self._thread.start()

    @property
    def is_complete(self) -> bool:
        """Whether all rows can be collated from the cache."""
        return all(part.cache.is_complete for part in self._parts)

    def collate(self, rows: list[int]) -> dict[str, Any] | None:
        """Return what the collator returns for rows of one dataset, numbered over all parts; None if files are missing.

        The first call lets the thread make files: it does not compete with the start of the training."""
        number = int(np.searchsorted(self._ends, rows[0], side="right"))
        first = int(self._ends[number - 1]) if number else 0
        inputs = self._parts[number].collate(np.array(rows) - first)
        self._is_training.set()
        return inputs

    def close(self) -> None:
        """Stop making files. A file that is half made is made again by the next run."""
        self._is_stopped.set()
        self._is_training.set()
        if self._thread is not None:
            self._thread.join()

    def _complete(self) -> None:
        """Open or make the missing files. Ranks of a machine begin at different ones, and share the work."""
        num_ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        turn = rank * len(self._missing) // num_ranks
        in_turn = self._missing[turn:] + self._missing[:turn]
        missing = [(part, number) for part, number in in_turn if not part.cache.open(number)]
        self._is_training.wait()
        if not self._is_made or not missing:
            return
        began, num_files = time.monotonic(), len(missing)
        try:
            while missing:
                missing = [
                    (part, number) for part, number in missing if not part.open_or_make(number, self._is_stopped)
                ]
                if missing and self._is_stopped.wait(POLL_SECONDS):
                    return
        except _Stopped:
            return
        except Exception as error:  # noqa: BLE001 - the tokenizer may be code of the model
            logger.warning(NOT_CACHED, first_line(error))
            return
        logger.info("token ids: %d files cached in %.0f s", num_files, time.monotonic() - began)


class _Stopped(Exception):
    """Making a file was stopped."""


class _Part:
    """The token ids of one dataset's rows."""

    def __init__(
        self,
        part: PlannedRows,
        shards: Sequence[Shard],
        cache_dir: Path,
        tokenizer_key: str,
        collate: Collate,
        make: Collate | None,
        vocab_size: int,
    ) -> None:
        self._table, self._make = part.rows.data, make
        indices = part.rows._indices  # set if rows were selected
        self._chosen = None if indices is None else indices.column(0).to_numpy()
        self._columns = tuple(part.rows.column_names)
        probes = collate([dict.fromkeys(self._columns, text) for text in PROBES])
        self._constants = {column: _constants(probes, column) for column in self._columns}
        key = _key([tokenizer_key, *self._columns], probes, self._columns)
        self.cache = TokenCache(cache_dir, key, shards, len(self._columns), vocab_size - 1)

    def collate(self, rows: Rows) -> dict[str, Any] | None:
        tokens = self.cache.take(rows if self._chosen is None else self._chosen[rows].astype(np.int64))
        if tokens is None:
            return None
        inputs: dict[str, Any] = {}
        for (column, constants), own in zip(self._constants.items(), tokens, strict=True):
            features = {**row_features(own.ids, own.lengths), **constants}
            inputs |= {f"{column}_{name}": value for name, value in features.items()}
        return inputs

    def open_or_make(self, number: int, is_stopped: threading.Event) -> bool:
        """Return whether the file is mapped. If not, another process is making it. Raises _Stopped."""
        if is_stopped.is_set():
            raise _Stopped
        assert self._make is not None
        return self.cache.open(number) or self.cache.make(number, self._tokenize(self._make, is_stopped))

    def _tokenize(self, make: Collate, is_stopped: threading.Event) -> Tokenize:
        def blocks(first: int, stop: int) -> Iterator[Tokens]:
            for start in range(first, stop, ROWS_PER_BLOCK):
                if is_stopped.is_set():
                    raise _Stopped
                rows = self._table.slice(start, min(ROWS_PER_BLOCK, stop - start)).to_pylist()
                yield _row_by_row(make(rows), self._columns)

        return blocks


def own_collator(collator: Any, model: SentenceTransformer) -> Any:
    """Return an equal collator with a tokenizer of its own: two threads cannot use one tokenizer at the same time."""
    transformer = copy.copy(model[0])
    transformer.processor = copy.deepcopy(transformer.processor)
    return dataclasses.replace(collator, preprocess_fn=transformer.preprocess)


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that its files would hold.

    Not of truncation and padding, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.update(truncation=None, padding=None)
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="tercet-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(names: Sequence[str], probes: dict[str, Any], columns: Sequence[str]) -> str:
    """Return a hash of what decides the ids: names, versions, and the ids of the probes.

    These depend on prompts, special tokens, truncation, and on code that is not in the tokenizer's files."""
    versions = {name: version(name) for name in ("tokenizers", "transformers", "sentence-transformers")}
    digest = hashlib.sha256(json.dumps([FORMAT, list(names), versions], sort_keys=True).encode())
    for column in columns:
        for name in ("input_ids", "cu_seq_lens_q"):
            digest.update(np.ascontiguousarray(probes[f"{column}_{name}"], dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def _constants(inputs: dict[str, Any], column: str) -> dict[str, Any]:
    """Return the features of a column that are equal for all rows, such as the length of its prompt."""
    names = {key.removeprefix(f"{column}_"): key for key in inputs if key.startswith(f"{column}_")}
    return {name: inputs[key] for name, key in names.items() if name not in ("input_ids", "cu_seq_lens_q")}


def _row_by_row(inputs: dict[str, Any], columns: Sequence[str]) -> Tokens:
    """Return the tokens of collated rows in the order of the file: the texts of a row follow each other."""
    ids = np.concatenate([inputs[f"{column}_input_ids"][0].numpy() for column in columns])
    lengths = np.stack([np.diff(inputs[f"{column}_cu_seq_lens_q"]) for column in columns]).astype(np.int64)
    starts = np.cumsum(lengths).reshape(lengths.shape) - lengths
    counts, begins = lengths.T.ravel(), starts.T.ravel()
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return Tokens(ids[np.repeat(begins, counts) + within], counts)
