"""Lines of a byte stream, bounded in memory, and their text."""

from __future__ import annotations

from typing import IO

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
