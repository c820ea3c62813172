"""Records of a CSV stream, such that a stray quote costs one record.

Python's reader takes a quote that never closes as the start of one field that is the rest of the file. Here it is
one bad record: reading goes on at the line after the one where that record began.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from typing import IO

from tercet.data.row_checks import Problem

MAX_FIELD_CHARS = 1 << 20
"""A longer field is bad; also the most that is read ahead for the end of a quote."""


def csv_records(stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, list[str], str, Problem | None]]:
    """Yields (line where the record starts from 1, fields, raw text, what is wrong with its quoting or None).

    Fields may be quoted and hold line ends. Empty lines are skipped. Bytes that are not UTF-8 come as surrogates.
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
    """Feeds `csv.reader` and remembers the lines of the current record."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._num_read = 0
        self._taken: list[str] = []
        self._waiting: deque[str | None] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._read()
        if line is None and self._taken:  # let the record that runs into it fail first
            self._waiting.appendleft(None)
            raise csv.Error("the record runs into an over-long line")
        self._num_read += 1
        if line is None:
            raise TooLong
        self._taken.append(line)
        return line

    def _read(self) -> str | None:
        """The next line of the stream, None for an over-long one. Raises StopIteration at its end."""
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
"""A longer line is no row, but a file without line ends."""


class TooLong(Exception):
    """A line of more than MAX_LINE_BYTES; the stream stands after it."""


def read_line(stream: IO[bytes]) -> bytes:
    """The next line with its line end, or nothing at the end of the stream. Raises TooLong after skipping one."""
    line = stream.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE_BYTES)
    raise TooLong


def decode(data: bytes, first: bool = False) -> str:
    """Text; each byte that is not UTF-8 becomes a lone surrogate. A mark at the `first` line's start is dropped."""
    text = data.decode("utf-8", "surrogateescape")
    return text[1:] if first and text.startswith("\ufeff") else text
