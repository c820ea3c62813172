"""Raw rows → a checked, split, sharded dataset version.

One pass: each row is read, checked, given a split by a hash, and written to that split's open Parquet file in a
temporary folder. Storage is touched only when all rows were read and few enough were bad; then shards, quarantine,
manifest and HEAD go up in that order, so that a version is visible whole or not at all.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from tercet.checks import MAX_TEXT_CHARS, BadKind, RepeatCounter, problem_of
from tercet.errors import ConfigError, DataError, TooManyBadRows
from tercet.manifest import (
    Manifest,
    Source,
    TextStatistics,
    content_id,
    dataset_prefix,
    publish,
    read_head,
    read_manifest,
    version_prefix,
)
from tercet.parquet_shards import ShardWriter
from tercet.sources import BadRow, Row, format_of, iter_rows, local_copy
from tercet.splits import SPLIT_SALT, SPLITS, SplitRule
from tercet.storage import Storage, sha256_of

TRIPLET = {"anchor": "anchor", "positive": "positive", "negative": "negative"}
MAX_RAW_CHARS = 2_000
"""Of a quarantined row's text, what is kept."""
_PROGRESS_ROWS = 10_000
_UPLOADS_AT_ONCE = 8
_COLUMN = re.compile(r"anchor|positive|negative(_[1-9]\d*)?")


@dataclass(frozen=True)
class Progress:
    """How far a build is; given to `on_progress` every 10,000 rows read and after every shard uploaded."""

    stage: str
    """"read" (done counts rows, total is unknown) or "upload" (done counts shards)."""
    done: int
    total: int | None
    num_bad_rows: int


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    manifest: Manifest
    """As storage holds it: of an earlier build where `already_published`."""
    already_published: bool
    """These very rows were a version before; it is HEAD again, and nothing was uploaded."""
    bad_rows: dict[str, int]
    """Of this build, by kind."""
    first_bad_rows: tuple[str, ...]
    """At most five, `file:line: kind: detail`."""
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know about a version that was published all the same."""
        found = []
        if self.bad_rows:
            found.append(f"{sum(self.bad_rows.values()):,} bad rows were quarantined ({_by_kind(self.bad_rows)})")
        if self.manifest.num_duplicate_rows:
            found.append(f"{self.manifest.num_duplicate_rows:,} rows repeat an earlier row; they were kept")
        if self.manifest.num_leaked_rows:
            found.append(f"{self.manifest.num_leaked_rows:,} eval and test rows are in another split too")
        found += [f"the {split} split has no rows" for split in SPLITS if not self.manifest.num_rows[split]]
        return tuple(found)


def build_version(
    sources: Sequence[str | Path],
    storage: Storage,
    name: str,
    columns: Mapping[str, str] = TRIPLET,
    group: str | None = None,
    max_bad_rows: float = 0.01,
    rows_per_shard: int = 65_536,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    max_text_chars: int = MAX_TEXT_CHARS,
    on_progress: Callable[[Progress], None] | None = None,
    endpoint_url: str | None = None,
) -> BuildResult:
    """Build and publish a version of dataset `name` from files or `s3://` URIs, and make it the newest.

    `columns` maps anchor, positive and any of negative, negative_1, negative_2, ... to the files' column names;
    without a negative the rows are pairs. `group` names the files' column whose rows must stay in one split; without
    it the anchor decides. `max_bad_rows` is a share of all rows, 0 to 1. `fractions` are train's, eval's and test's.

    Raises TooManyBadRows above that share, DataError where no good row is left or a file cannot be read, ConfigError
    for arguments that cannot work. Then nothing was written to storage. Needs temporary disk space for the shards,
    and 16 bytes of memory a row.
    """
    began = time.monotonic()
    wanted = _wanted_columns(columns, group)
    _check_arguments(sources, max_bad_rows, rows_per_shard, fractions, max_text_chars)
    dataset_prefix(name)
    rule = SplitRule(by="group" if group else "anchor", salt=SPLIT_SALT, fractions=fractions)
    with tempfile.TemporaryDirectory(prefix="tercet-build-") as folder, ExitStack() as stack:
        build = _Build(Path(folder), wanted, rule, rows_per_shard, max_text_chars, stack)
        read = tuple(build.take_source(source, endpoint_url, on_progress) for source in sources)
        build.close()
        build.judge(max_bad_rows)
        splits = {split: build.writers[split].finish() for split in SPLITS}
        version = content_id(tuple(wanted), rule, splits)
        prefix = version_prefix(name, version)
        already_published = storage.exists(f"{prefix}/manifest.json")
        if already_published:
            manifest = read_manifest(storage, name, version)
        else:
            manifest = Manifest(
                dataset=name,
                version=version,
                columns=tuple(wanted),
                splits=splits,
                split_rule=rule,
                num_rows={split: sum(shard.num_rows for shard in splits[split]) for split in SPLITS},
                bad_rows=dict(build.bad_rows),
                num_duplicate_rows=build.repeats.num_duplicate_rows(),
                num_leaked_rows=build.repeats.num_leaked_rows(),
                text_statistics=build.text_statistics(),
                sources=read,
                created_at=datetime.now(timezone.utc).replace(microsecond=0),
                parent=read_head(storage, name),
            )
            paths = {f"{prefix}/{key}": path for split in SPLITS for key, path in build.writers[split].paths.items()}
            _upload(storage, paths, build.num_bad_rows, on_progress)
            if build.bad_rows:
                storage.upload(build.quarantine_path, f"{prefix}/quarantine.jsonl")
        published = publish(storage, manifest)
        seconds = time.monotonic() - began
        already_published = already_published or published is not manifest  # someone else may have been faster
        return BuildResult(published, already_published, dict(build.bad_rows), build.first_bad_rows, seconds)


class _Build:
    """The state of one pass over the rows."""

    def __init__(
        self,
        folder: Path,
        wanted: dict[str, str],
        rule: SplitRule,
        rows_per_shard: int,
        max_chars: int,
        stack: ExitStack,
    ) -> None:
        self._wanted, self._rule, self._max_chars = wanted, rule, max_chars
        self._texts = tuple(column for column in wanted if column != "group")
        self.writers = {split: ShardWriter(folder, split, tuple(wanted), rows_per_shard) for split in SPLITS}
        for writer in self.writers.values():
            stack.callback(writer.close)
        self.quarantine_path = folder / "quarantine.jsonl"
        self._quarantine: TextIO = stack.enter_context(self.quarantine_path.open("w", encoding="utf-8"))
        self.repeats = RepeatCounter(SPLITS)
        self.bad_rows: Counter[str] = Counter()
        self.first_bad_rows: tuple[str, ...] = ()
        self._num_good = 0
        self._sum_chars = dict.fromkeys(self._texts, 0)
        self._max_seen = dict.fromkeys(self._texts, 0)

    @property
    def num_bad_rows(self) -> int:
        return sum(self.bad_rows.values())

    def take_source(
        self, source: str | Path, endpoint_url: str | None, on_progress: Callable[[Progress], None] | None
    ) -> Source:
        num_before = self._num_good + self.num_bad_rows
        with local_copy(source, endpoint_url) as path:
            for row in iter_rows(path, self._wanted, name=str(source)):
                self._take(row)
                done = self._num_good + self.num_bad_rows
                if on_progress is not None and done % _PROGRESS_ROWS == 0:
                    on_progress(Progress("read", done, None, self.num_bad_rows))
            num_rows = self._num_good + self.num_bad_rows - num_before
            return Source(name=str(source), sha256=sha256_of(path), num_rows=num_rows)

    def _take(self, row: Row | BadRow) -> None:
        if isinstance(row, BadRow):
            self._set_aside(row, row.kind, row.detail, row.raw)
            return
        values = row.values
        group = values.get("group")
        if isinstance(group, int) and not isinstance(group, bool):
            values["group"] = str(group)
        problem = problem_of(values, tuple(self._wanted), self._max_chars)
        if problem is not None:
            raw = row.raw or json.dumps(values, default=str)
            self._set_aside(row, *problem, raw)
            return
        texts = [str(values[column]) for column in self._texts]
        split = self._rule.split_of(str(values[self._rule.by]))
        self.writers[split].add([str(values[column]) for column in self._wanted])
        self.repeats.add(split, texts)
        self._num_good += 1
        for column, text in zip(self._texts, texts, strict=True):
            self._sum_chars[column] += len(text)
            self._max_seen[column] = max(self._max_seen[column], len(text))

    def _set_aside(self, row: Row | BadRow, kind: BadKind, detail: str, raw: str) -> None:
        self.bad_rows[kind] += 1
        if len(self.first_bad_rows) < 5:
            self.first_bad_rows += (f"{row.source}:{row.line}: {kind}: {detail}",)
        entry = {"source": row.source, "line": row.line, "kind": kind, "detail": detail, "raw": raw[:MAX_RAW_CHARS]}
        self._quarantine.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        self._quarantine.close()

    def judge(self, max_bad_rows: float) -> None:
        """Raise where what was read must not be published."""
        num_rows = self._num_good + self.num_bad_rows
        first = "\n".join(f"  {line}" for line in self.first_bad_rows)
        if num_rows == 0:
            raise DataError("the sources hold no rows", "Check that they are the files you meant.")
        if self.num_bad_rows > max_bad_rows * num_rows:
            raise TooManyBadRows(
                f"{self.num_bad_rows:,} of {num_rows:,} rows are bad ({self.num_bad_rows / num_rows:.2%}, the limit is "
                f"{max_bad_rows:.2%}): {_by_kind(self.bad_rows)}; the first:\n{first}",
                "Nothing was published. Mend the rows, or raise the limit on the share of bad rows.",
            )
        if self._num_good == 0:
            raise DataError(f"all {num_rows:,} rows are bad: {_by_kind(self.bad_rows)}; the first:\n{first}")

    def text_statistics(self) -> dict[str, TextStatistics]:
        return {
            column: TextStatistics(
                mean_chars=round(self._sum_chars[column] / self._num_good, 2), max_chars=self._max_seen[column]
            )
            for column in self._texts
        }


def _upload(
    storage: Storage, paths: Mapping[str, Path], num_bad: int, on_progress: Callable[[Progress], None] | None
) -> None:
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        uploads = [pool.submit(storage.upload, path, key) for key, path in paths.items()]
        try:
            for done, upload in enumerate(uploads, start=1):
                upload.result()
                if on_progress is not None:
                    on_progress(Progress("upload", done, len(uploads), num_bad))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _wanted_columns(columns: Mapping[str, str], group: str | None) -> dict[str, str]:
    """tercet's columns in the order they have in shards → the file's columns."""
    for column in columns:
        if not _COLUMN.fullmatch(column):
            raise ConfigError(f"unknown column {column!r}", "Columns are anchor, positive, negative, negative_1, ...")
    for column in ("anchor", "positive"):
        if column not in columns:
            raise ConfigError(f"column {column!r} is not mapped", f"Add {column}=<its name in the files>.")
    negatives = sorted(set(columns) - {"anchor", "positive"}, key=lambda column: int(column[len("negative_") :] or 0))
    wanted = {column: columns[column] for column in ("anchor", "positive", *negatives)}
    return wanted if group is None else {**wanted, "group": group}


def _check_arguments(
    sources: Sequence[str | Path],
    max_bad_rows: float,
    rows_per_shard: int,
    fractions: tuple[float, float, float],
    max_text_chars: int,
) -> None:
    if not sources:
        raise ConfigError("no sources", "Name at least one file.")
    for source in sources:
        format_of(str(source))
    if not 0 <= max_bad_rows <= 1:
        raise ConfigError(f"max_bad_rows is {max_bad_rows}", "It is a share of all rows: 0.01 is one in a hundred.")
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or not fractions[0]:
        raise ConfigError(f"fractions are {fractions}", "Train's (above 0), eval's and test's, summing to 1.")
    if rows_per_shard < 1 or max_text_chars < 1:
        raise ConfigError("rows_per_shard and max_text_chars must be at least 1")


def _by_kind(bad_rows: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {num:,}" for kind, num in sorted(bad_rows.items(), key=lambda item: (-item[1], item[0])))
