"""Turn raw rows into checked rows; quarantine bad rows with file and line.

`build` and `append` share this step. It reads the sources once, in order. At the end, `check_bad_row_share` refuses the
sources if too many of their rows were bad.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from tercet.data.manifest import Source, TextStatistics
from tercet.data.readers import BadRow, Row, format_of, iter_rows, local_copy
from tercet.data.row_checks import MAX_TEXT_CHARS, is_text, problem_of
from tercet.errors import ConfigError, DataError, TooManyBadRows
from tercet.storage.base import sha256_of

TRIPLET = {"anchor": "anchor", "positive": "positive", "negative": "negative"}
MAX_RAW_CHARS = 2_000
"""A quarantined row's text is cut to this length."""
PROGRESS_ROWS = 10_000
MAX_FIRST_BAD_ROWS = 5
_TEXT_COLUMN = re.compile(r"anchor|positive|negative(_[1-9]\d*)?")
_SLICE = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How raw rows are read, checked and cut into shards. Raises ConfigError for values that cannot work."""

    columns: Mapping[str, str] = field(default_factory=TRIPLET.copy)
    """tercet's column names → the files' column names: anchor, positive, and any of negative, negative_1, negative_2,
    and so on. Without a negative, the rows are pairs."""
    group: str | None = None
    """The files' column whose equal values keep rows in one split; without it, the anchor does."""
    slices: tuple[str, ...] = ()
    """Label columns, such as a language, for which results are reported separately."""
    max_bad_rows: float = 0.01
    """Publish nothing if a larger share of the rows is bad; 0 to 1."""
    rows_per_shard: int = 65_536
    max_text_chars: int = MAX_TEXT_CHARS
    """A row with a longer text is bad."""
    endpoint_url: str | None = None
    """S3 endpoint of `s3://` sources; None for AWS."""

    def __post_init__(self) -> None:
        for column in self.columns:
            if not _TEXT_COLUMN.fullmatch(column):
                hint = "Columns are anchor, positive, negative, negative_1, ..."
                raise ConfigError(f"unknown column {column!r}", hint)
        for column in ("anchor", "positive"):
            if column not in self.columns:
                raise ConfigError(f"column {column!r} is not mapped", f"Add {column}=<its name in the files>.")
        for name in self.slices:
            if not _SLICE.fullmatch(name):
                hint = "Use only letters, digits and '_', at most 64 characters."
                raise ConfigError(f"column {name!r} cannot name slices", hint)
        if not 0 <= self.max_bad_rows <= 1:
            raise ConfigError(f"max_bad_rows is {self.max_bad_rows}", "It is a share of all rows: 0.01 is one in 100.")
        for name in ("rows_per_shard", "max_text_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", "It must be at least 1.")

    @property
    def wanted_columns(self) -> dict[str, str]:
        """tercet's columns → the files' columns, in shard order: anchor, positive, negatives, group, slices."""
        columns = {column: self.columns[column] for column in sorted(self.columns, key=_position)}
        if self.group is not None:
            columns["group"] = self.group
        return columns | {f"slice_{name}": name for name in self.slices}


DEFAULT_OPTIONS = IngestOptions()


@dataclass(frozen=True)
class Progress:
    """Progress of a build, reported every 10,000 rows read and after every shard uploaded."""

    stage: str
    """"read" (`done` counts rows, `total` is unknown) or "upload" (`done` counts shards)."""
    done: int
    total: int | None
    num_bad_rows: int


OnProgress = Callable[[Progress], None]


class GoodRow(NamedTuple):
    """A row that passed every check."""

    source: str
    line: int
    values: tuple[str, ...]
    """In the order of `IngestOptions.wanted_columns`."""


class Ingest:
    """One pass over the sources. Good rows are returned; bad rows are written to the quarantine as JSON lines."""

    def __init__(self, options: IngestOptions, quarantine: TextIO, on_progress: OnProgress | None = None) -> None:
        self._options, self._quarantine, self._on_progress = options, quarantine, on_progress
        self._columns = options.wanted_columns
        self._texts = tuple(index for index, column in enumerate(self._columns) if is_text(column))
        self.bad_rows: Counter[str] = Counter()
        """Bad rows by kind."""
        self.first_bad_rows: tuple[str, ...] = ()
        """At most five, each as `file:line: kind: detail`."""
        self.sources: tuple[Source, ...] = ()
        self._num_good = 0
        self._sum_chars = [0] * len(self._columns)
        self._max_chars = [0] * len(self._columns)

    @property
    def num_bad_rows(self) -> int:
        """Bad rows of all kinds."""
        return sum(self.bad_rows.values())

    @property
    def num_rows(self) -> int:
        """Rows read so far, bad ones included."""
        return self._num_good + self.num_bad_rows

    def read(self, source: str | Path) -> Iterator[GoodRow]:
        """Yield the good rows of one source. Raises DataError if it cannot be read."""
        num_before = self.num_rows
        with local_copy(source, self._options.endpoint_url) as path:
            for row in iter_rows(path, self._columns, name=str(source)):
                good = self._checked(row)
                if good is not None:
                    yield good
                if self._on_progress is not None and self.num_rows % PROGRESS_ROWS == 0:
                    self._on_progress(Progress("read", self.num_rows, None, self.num_bad_rows))
            read = Source(name=str(source), sha256=sha256_of(path), num_rows=self.num_rows - num_before)
        self.sources += (read,)

    def _checked(self, row: Row | BadRow) -> GoodRow | None:
        if isinstance(row, BadRow):
            self._count_bad(row.source, row.line, row.kind, row.detail, row.raw)
            return None
        values = row.values
        for column, value in values.items():
            if not is_text(column) and isinstance(value, int) and not isinstance(value, bool):
                values[column] = str(value)  # a number is a valid label
        problem = problem_of(values, tuple(self._columns), self._options.max_text_chars)
        if problem is not None:
            self._count_bad(row.source, row.line, *problem, row.raw or json.dumps(values, default=str))
            return None
        good = GoodRow(row.source, row.line, tuple(str(values[column]) for column in self._columns))
        self._num_good += 1
        for index in self._texts:
            num_chars = len(good.values[index])
            self._sum_chars[index] += num_chars
            self._max_chars[index] = max(self._max_chars[index], num_chars)
        return good

    def _count_bad(self, source: str, line: int, kind: str, detail: str, raw: str) -> None:
        self.bad_rows[kind] += 1
        if len(self.first_bad_rows) < MAX_FIRST_BAD_ROWS:
            self.first_bad_rows += (f"{source}:{line}: {kind}: {detail}",)
        self._write_to_quarantine(source, line, kind, detail, raw)

    def exclude(self, row: GoodRow, kind: str, detail: str) -> None:
        """Write a good row to the quarantine. It is not counted as bad."""
        self._write_to_quarantine(row.source, row.line, kind, detail, " | ".join(row.values))

    def _write_to_quarantine(self, source: str, line: int, kind: str, detail: str, raw: str) -> None:
        entry = {"source": source, "line": line, "kind": kind, "detail": detail, "raw": raw[:MAX_RAW_CHARS]}
        self._quarantine.write(json.dumps(entry) + "\n")

    def check_bad_row_share(self) -> None:
        """Check that what was read may be published.

        Raises DataError if there is no good row, TooManyBadRows if the share of bad rows is above `max_bad_rows`."""
        limit = self._options.max_bad_rows
        first = "\n".join(f"  {line}" for line in self.first_bad_rows)
        if self.num_rows == 0:
            raise DataError("the sources hold no rows", "Check that these are the files you meant.")
        if self.num_bad_rows > limit * self.num_rows:
            raise TooManyBadRows(
                f"{self.num_bad_rows:,} of {self.num_rows:,} rows are bad ({self.num_bad_rows / self.num_rows:.2%}, "
                f"the limit is {limit:.2%}): {_by_kind(self.bad_rows)}; the first:\n{first}",
                "Nothing was published. Fix the rows, or raise the limit (--max-bad-rows; nightly.max_bad_rows).",
            )
        if self._num_good == 0:
            bad = f"all {self.num_rows:,} rows are bad: {_by_kind(self.bad_rows)}; the first:\n{first}"
            raise DataError(bad, "Nothing was published. Fix the rows, or check that the right columns are named.")

    def text_statistics(self) -> dict[str, TextStatistics]:
        """Text lengths of the good rows, by column. Needs at least one good row."""
        columns = tuple(self._columns)
        return {
            columns[index]: TextStatistics(
                mean_chars=round(self._sum_chars[index] / self._num_good, 2), max_chars=self._max_chars[index]
            )
            for index in self._texts
        }


def _position(column: str) -> int:
    """Place of a text column in the shards: anchor, positive, negative, negative_1, negative_2, and so on."""
    if column in ("anchor", "positive"):
        return ("anchor", "positive").index(column)
    return 2 + int(column[len("negative_") :] or 0)


def check_sources(sources: Sequence[str | Path]) -> None:
    """Check that there are sources and that the format of each is known. Raises ConfigError or DataError."""
    if not sources:
        raise ConfigError("no sources", "Name at least one file.")
    for source in sources:
        format_of(str(source))


def _by_kind(bad_rows: Mapping[str, int]) -> str:
    """Counts of bad rows as text, the most frequent kind first."""
    return ", ".join(f"{kind} {num:,}" for kind, num in sorted(bad_rows.items(), key=lambda item: (-item[1], item[0])))
