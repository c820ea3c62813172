"""Check rows: what is wrong with one, how often rows repeat, and which leak across splits. No files, no storage.

- A *bad* row has one kind (`BadKind`). It is quarantined, never repaired.
- A *duplicate* is a good row. It is kept, counted, and reported in the manifest as a warning.
- A *leaked* row is a good row whose anchor and positive are in a later split (of train, eval, test) too. It is excluded
  from the earlier one.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Literal, NamedTuple

BadKind = Literal[
    "not_json",  # the line is not JSON
    "not_csv",  # the record's quoting is broken
    "wrong_field_count",  # a CSV record with more or fewer fields than the header
    "bad_utf8",  # bytes that are not UTF-8, or half a surrogate pair
    "missing_column",
    "null",
    "wrong_type",  # a value is not text, or a row is not a JSON object
    "blank",  # only whitespace and invisible characters
    "over_long",
    "anchor_equals_positive",
    "positive_equals_negative",
    "anchor_equals_negative",
]

MAX_TEXT_CHARS = 100_000
"""Default limit of one text. Far longer than any encoder's window, so a longer text means a broken export."""

_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\x00"


class Problem(NamedTuple):
    """Why a row is bad: the kind, and a detail that names the column and the value."""

    kind: BadKind
    detail: str


def normalise(text: str) -> str:
    """Return the form in which texts are compared: NFC, each run of whitespace one space, ends stripped.

    Case is kept: `ls -a` and `ls -A` are different texts.
    """
    text = " ".join(text.split())
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def is_valid_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogate, which stands for an invalid byte or comes from a broken JSON escape."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_text(column: str) -> bool:
    """Whether a column holds texts, which are encoded; group and slices hold labels."""
    return column != "group" and not column.startswith("slice_")


def problem_of(
    values: Mapping[str, object], columns: Sequence[str], max_text_chars: int = MAX_TEXT_CHARS
) -> Problem | None:
    """Return the first problem of a row, or None if it is good.

    Each of `columns` must hold a text of 1 to `max_text_chars` characters. After `normalise`, the anchor must differ
    from the positive, and both from each negative."""
    for column in columns:
        if column not in values:
            return Problem("missing_column", f"the row has no {column}")
        value = values[column]
        if value is None:
            return Problem("null", f"{column} is null")
        if not isinstance(value, str):
            return Problem("wrong_type", f"{column} is {type(value).__name__}, not text")
        if not is_valid_unicode(value):
            return Problem("bad_utf8", f"{column} holds bytes that are not UTF-8")
        if not value.strip().strip(_INVISIBLE):
            return Problem("blank", f"{column} is blank")
        if len(value) > max_text_chars:
            return Problem("over_long", f"{column} has {len(value):,} characters, the limit is {max_text_chars:,}")
    return _identical_columns({column: normalise(str(values[column])) for column in filter(is_text, columns)})


def _identical_columns(texts: Mapping[str, str]) -> Problem | None:
    anchor, positive = texts.get("anchor"), texts.get("positive")
    if anchor is not None and anchor == positive:
        return Problem("anchor_equals_positive", "anchor and positive are the same text")
    for column, text in texts.items():
        if column in ("anchor", "positive"):
            continue
        if text == positive:
            return Problem("positive_equals_negative", f"positive and {column} are the same text")
        if text == anchor:
            return Problem("anchor_equals_negative", f"anchor and {column} are the same text")
    return None


class RepeatCounter:
    """Counts repeated rows, and finds pairs that are in more than one split.

    Memory: two 8-byte hashes per row (16 MB for a million rows), and about twice that while counting. The probability
    that two different rows share a hash is 3e-8 among a million rows, and 3e-4 among a hundred million.
    """

    def __init__(self, splits: Sequence[str]) -> None:
        self._rows = array("Q")
        self._pairs = {split: array("Q") for split in splits}

    def add(self, split: str, texts: Sequence[str]) -> None:
        """Add a good row: its texts, anchor first and positive second."""
        self._rows.append(_hash8(texts))
        self._pairs[split].append(row_hash(texts[:2]))

    def num_duplicate_rows(self) -> int:
        """Count the rows whose texts all equal those of an earlier row of any split, character by character."""
        import numpy as np

        return len(self._rows) - len(np.unique(np.frombuffer(self._rows, dtype=np.uint64)))

    def leaked_pairs(self) -> dict[str, set[int]]:
        """Return for each split the `row_hash` of pairs (anchor and positive) that a later split has too.

        A split has no entry if all later splits are empty."""
        import numpy as np

        pairs = {split: np.unique(np.frombuffer(hashes, dtype=np.uint64)) for split, hashes in self._pairs.items()}
        order = list(pairs)
        return {
            split: set(np.intersect1d(pairs[split], later).tolist())
            for number, split in enumerate(order[:-1])
            if len(later := np.concatenate([pairs[other] for other in order[number + 1 :]]))
        }


def text_hash(text: str) -> int:
    """Hash a text to 8 bytes, ignoring spacing and Unicode form.

    The probability that any of a million texts shares its hash with one of a hundred million others is 5e-6."""
    return _hash8([normalise(text)])


def row_hash(texts: Sequence[str]) -> int:
    """Hash a row's texts to 8 bytes, ignoring spacing and Unicode form."""
    return _hash8([normalise(text) for text in texts])


def _hash8(texts: Sequence[str]) -> int:
    digest = blake2b(digest_size=8)
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")
