"""Read the records of a CSV stream so that a stray quote costs only one record.

Python's reader takes a quote that never closes as the start of a field that spans the rest of the file. Here it is one
bad record, and reading resumes at the line after the record's first line.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO

from tercet.data.row_checks import Problem

MAX_FIELD_CHARS = 1 << 20
"""A longer field makes the record bad. Also limits how far ahead a closing quote is searched."""


def csv_records(stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, list[str], str, Problem | None]]:
    """Yield (first line of the record, from 1; fields; raw text; problem with its quoting or length, or None).

    Fields may be quoted and contain line ends. Empty lines are skipped. Bytes that are not UTF-8 become surrogates.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.start_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except TooLong:
            yield start, [], "", Problem("over_long", f"a line of more than {MAX_LINE_BYTES:,} bytes")
        except csv.Error as error:
            raw = lines.give_back_all_but_first()
            yield start, [], raw, Problem("not_csv", f"broken quoting: {error}")
        else:
            if fields:
                yield start, fields, lines.record(), None


class _Lines:
    """An iterator of lines for `csv.reader` that remembers those of the current record and can take them back."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._num_read = 0
        self._taken: list[str] = []
        self._waiting: deque[str | None] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._read()
        if line is None and self._taken:  # first end the record that the over-long line interrupts
            self._waiting.appendleft(None)
            raise csv.Error("the record continues into an over-long line")
        self._num_read += 1
        if line is None:
            raise TooLong
        self._taken.append(line)
        return line

    def _read(self) -> str | None:
        """Return the next line of the stream, or None if it is over-long. Raises StopIteration at the end."""
        try:
            data = read_line(self._stream)
        except TooLong:
            return None
        if not data:
            raise StopIteration
        return decode(data, first=self._num_read == 0)

    def start_record(self) -> int:
        self._taken = []
        return self._num_read + 1

    def record(self) -> str:
        return "".join(self._taken).rstrip("\r\n")

    def give_back_all_but_first(self) -> str:
        first, *others = self._taken or [""]
        self._waiting.extendleft(reversed(others))
        self._num_read -= len(others)
        return first.rstrip("\r\n")


MAX_LINE_BYTES = 16 << 20
"""A longer line is not a row: the file probably has no line ends."""


class TooLong(Exception):
    """A line has more than MAX_LINE_BYTES. It was skipped; the stream is at the next line."""


def read_line(stream: IO[bytes]) -> bytes:
    """Return the next line with its line end; empty at the stream's end. Raises TooLong after an over-long line."""
    line = stream.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE_BYTES)
    raise TooLong


def decode(data: bytes, first: bool = False) -> str:
    """Decode UTF-8; each invalid byte becomes a lone surrogate. Drops the byte order mark of the `first` line."""
    text = data.decode("utf-8", "surrogateescape")
    return text[1:] if first and text.startswith("\ufeff") else text
