"""Raw rows → checked rows in the columns that were asked for; bad ones are set aside with file and line.

For whoever builds a version of a dataset, anew or upon another one: it reads sources once, in order, and judges at the
end whether so many rows were bad that nothing may be published.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from tercet.data.manifest import Source, TextStatistics
from tercet.data.readers import BadRow, Row, format_of, iter_rows, local_copy
from tercet.data.row_checks import MAX_TEXT_CHARS, is_text, problem_of
from tercet.errors import ConfigError, DataError, TooManyBadRows
from tercet.storage.base import sha256_of

TRIPLET = {"anchor": "anchor", "positive": "positive", "negative": "negative"}
MAX_RAW_CHARS = 2_000
"""Of a quarantined row's text, what is kept."""
PROGRESS_ROWS = 10_000
_TEXT_COLUMN = re.compile(r"anchor|positive|negative(_[1-9]\d*)?")
_SLICE = re.compile(r"[A-Za-z0-9_]{1,64}")


@dataclass(frozen=True)
class Progress:
    """How far a build is; given to `on_progress` every 10,000 rows read and after every shard uploaded."""

    stage: str
    """"read" (done counts rows, total is unknown) or "upload" (done counts shards)."""
    done: int
    total: int | None
    num_bad_rows: int


class GoodRow(NamedTuple):
    """A row that passed every check."""

    source: str
    line: int
    values: tuple[str, ...]
    """In the order of the columns."""


class Ingest:
    """One pass over sources. Bad rows go to `quarantine_path` as JSON lines; the caller closes what `file` is."""

    def __init__(self, columns: Mapping[str, str], quarantine: TextIO, max_text_chars: int = MAX_TEXT_CHARS) -> None:
        """columns: as `wanted_columns` returns them."""
        self._columns, self._quarantine, self._max_text_chars = dict(columns), quarantine, max_text_chars
        self._texts = tuple(index for index, column in enumerate(columns) if is_text(column))
        self.bad_rows: Counter[str] = Counter()
        self.first_bad_rows: tuple[str, ...] = ()
        self.sources: tuple[Source, ...] = ()
        self._num_good = 0
        self._sum_chars = [0] * len(self._columns)
        self._max_chars = [0] * len(self._columns)

    @property
    def num_bad_rows(self) -> int:
        """Of all kinds."""
        return sum(self.bad_rows.values())

    @property
    def num_rows(self) -> int:
        """That were read, bad ones included."""
        return self._num_good + self.num_bad_rows

    def read(
        self, source: str | Path, endpoint_url: str | None, on_progress: Callable[[Progress], None] | None
    ) -> Iterator[GoodRow]:
        """The good rows of one source. Raises DataError where it cannot be read."""
        num_before = self.num_rows
        with local_copy(source, endpoint_url) as path:
            for row in iter_rows(path, self._columns, name=str(source)):
                good = self._checked(row)
                if good is not None:
                    yield good
                if on_progress is not None and self.num_rows % PROGRESS_ROWS == 0:
                    on_progress(Progress("read", self.num_rows, None, self.num_bad_rows))
            read = Source(name=str(source), sha256=sha256_of(path), num_rows=self.num_rows - num_before)
        self.sources += (read,)

    def _checked(self, row: Row | BadRow) -> GoodRow | None:
        if isinstance(row, BadRow):
            self._count_bad(row.source, row.line, row.kind, row.detail, row.raw)
            return None
        values = row.values
        for column, value in values.items():
            if not is_text(column) and isinstance(value, int) and not isinstance(value, bool):
                values[column] = str(value)  # a number is a fine label
        problem = problem_of(values, tuple(self._columns), self._max_text_chars)
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
        if len(self.first_bad_rows) < 5:
            self.first_bad_rows += (f"{source}:{line}: {kind}: {detail}",)
        self.set_aside(source, line, kind, detail, raw)

    def set_aside(self, source: str, line: int, kind: str, detail: str, raw: str) -> None:
        """Keep a row in the quarantine. It does not count as bad."""
        entry = {"source": source, "line": line, "kind": kind, "detail": detail, "raw": raw[:MAX_RAW_CHARS]}
        self._quarantine.write(json.dumps(entry) + "\n")

    def check_bad_row_share(self, max_bad_rows: float) -> None:
        """Raises DataError or TooManyBadRows where what was read must not be published."""
        first = "\n".join(f"  {line}" for line in self.first_bad_rows)
        if self.num_rows == 0:
            raise DataError("the sources hold no rows", "Check that they are the files you meant.")
        if self.num_bad_rows > max_bad_rows * self.num_rows:
            raise TooManyBadRows(
                f"{self.num_bad_rows:,} of {self.num_rows:,} rows are bad ({self.num_bad_rows / self.num_rows:.2%}, "
                f"the limit is {max_bad_rows:.2%}): {by_kind(self.bad_rows)}; the first:\n{first}",
                "Nothing was published. Mend the rows, or raise the limit (--max-bad-rows; nightly.max_bad_rows).",
            )
        if self._num_good == 0:
            bad = f"all {self.num_rows:,} rows are bad: {by_kind(self.bad_rows)}; the first:\n{first}"
            raise DataError(bad, "Nothing was published. Mend the rows, or check which columns are meant.")

    def text_statistics(self) -> dict[str, TextStatistics]:
        """Of the good rows that were read, of which there must be one."""
        columns = tuple(self._columns)
        return {
            columns[index]: TextStatistics(
                mean_chars=round(self._sum_chars[index] / self._num_good, 2), max_chars=self._max_chars[index]
            )
            for index in self._texts
        }


def wanted_columns(columns: Mapping[str, str], group: str | None, slices: Sequence[str] = ()) -> dict[str, str]:
    """tercet's columns in the order they have in shards → the file's columns. Raises ConfigError."""
    for column in columns:
        if not _TEXT_COLUMN.fullmatch(column):
            raise ConfigError(f"unknown column {column!r}", "Columns are anchor, positive, negative, negative_1, ...")
    for column in ("anchor", "positive"):
        if column not in columns:
            raise ConfigError(f"column {column!r} is not mapped", f"Add {column}=<its name in the files>.")
    for name in slices:
        if not _SLICE.fullmatch(name):
            raise ConfigError(f"column {name!r} cannot name slices", "Use letters, digits and '_', 64 at most.")
    negatives = sorted(set(columns) - {"anchor", "positive"}, key=lambda column: int(column[len("negative_") :] or 0))
    wanted = {column: columns[column] for column in ("anchor", "positive", *negatives)}
    if group is not None:
        wanted["group"] = group
    return {**wanted, **{f"slice_{name}": name for name in slices}}


def check_sources(sources: Sequence[str | Path], max_bad_rows: float) -> None:
    """Raises ConfigError or DataError for arguments that cannot work."""
    if not sources:
        raise ConfigError("no sources", "Name at least one file.")
    for source in sources:
        format_of(str(source))
    if not 0 <= max_bad_rows <= 1:
        raise ConfigError(f"max_bad_rows is {max_bad_rows}", "It is a share of all rows: 0.01 is one in a hundred.")


def by_kind(bad_rows: Mapping[str, int]) -> str:
    """In words, the most frequent kind first."""
    return ", ".join(f"{kind} {num:,}" for kind, num in sorted(bad_rows.items(), key=lambda item: (-item[1], item[0])))
