"""Append new rows to a dataset, as a version that extends the newest one.

    sources → checked rows → without repeated rows → without near-duplicates across the splits → shards → version → HEAD

The new version lists the shards of its parent and adds its own, so no row is written twice. A hash of a row's group (or
anchor) assigns its split, which never changes. If several processes append at once, each extends the version that the
one before it published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.data.ingest import DEFAULT_OPTIONS, GoodRow, Ingest, IngestOptions, OnProgress, check_sources
from tercet.data.manifest import SPLITS, Manifest, TextStatistics, content_id
from tercet.data.near_duplicates import NearDuplicates
from tercet.data.readers import local_copy
from tercet.data.row_checks import row_hash
from tercet.data.shard_writer import SplitWriters, upload
from tercet.data.versions import publish, read_manifest
from tercet.errors import ConfigError, Conflict
from tercet.storage import Storage
from tercet.storage.base import local_errors, sha256_of

ATTEMPTS = 20
"""Each attempt extends another version, because another process published one meanwhile."""
ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class AppendResult:
    """What was appended, and which rows were not."""

    manifest: Manifest
    """The newest version. If nothing was added, the parent."""
    num_added_rows: dict[str, int]
    """Rows by split; empty if nothing was added."""
    num_repeated_rows: int
    num_near_duplicates: int
    bad_rows: dict[str, int]
    first_bad_rows: tuple[str, ...]
    num_known_sources: int
    """Files that an earlier version had read already, byte for byte. They were skipped."""

    @property
    def is_new(self) -> bool:
        """Whether there is a new version."""
        return bool(self.num_added_rows)

    def text(self) -> str:
        """The result in one line."""
        added = ", ".join(f"{split} {num:,}" for split, num in self.num_added_rows.items())
        excluded = {
            "already in the dataset": self.num_repeated_rows,
            "near-duplicates across the splits": self.num_near_duplicates,
            "bad": sum(self.bad_rows.values()),
        }
        parts = [f"added {added} rows" if added else "nothing new"]
        parts += [f"{num:,} rows {what}" for what, num in excluded.items() if num]
        if self.num_known_sources:
            files = "1 file was" if self.num_known_sources == 1 else f"{self.num_known_sources:,} files were"
            parts.append(f"{files} read before")
        return "; ".join(parts)


def append(
    sources: Sequence[str | Path],
    storage: Storage,
    name: str,
    options: IngestOptions = DEFAULT_OPTIONS,
    *,
    on_progress: OnProgress | None = None,
    cache_dir: Path | None = None,
) -> AppendResult:
    """Add the rows that dataset `name` does not have yet, from files or `s3://` URIs, as a new version.

    Reads all rows of the parent version through the cache. Holds the new rows in memory, and 8 bytes per row of the
    parent.

    Raises DatasetNotFound if there is no version to extend, ConfigError if its columns differ, Conflict if other
    processes kept publishing, and what `build_version` raises. In these cases nothing was published."""
    check_sources(sources)
    with tempfile.TemporaryDirectory(prefix="tercet-append-") as temporary:
        for _ in range(ATTEMPTS):
            parent = read_manifest(storage, name)
            _check_columns(parent, options.wanted_columns)
            try:
                with ExitStack() as stack:
                    folder = Path(tempfile.mkdtemp(dir=temporary))
                    attempt = _Append(storage, parent, folder, options, stack, on_progress, cache_dir)
                    attempt.read(sources)
                    return attempt.publish()
            except Conflict:
                continue
    raise Conflict(
        f"{name} got {ATTEMPTS} other versions while rows were appended to it",
        "Several processes publish this dataset. Append again; no row is lost.",
    )


class _Append:
    """One attempt to extend one version."""

    def __init__(
        self,
        storage: Storage,
        parent: Manifest,
        folder: Path,
        options: IngestOptions,
        stack: ExitStack,
        on_progress: OnProgress | None,
        cache_dir: Path | None,
    ) -> None:
        self._storage, self._parent, self._folder, self._cache_dir = storage, parent, folder, cache_dir
        self._on_progress = on_progress
        self._quarantine = stack.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))
        self._ingest = Ingest(options, self._quarantine, on_progress)
        self._writers = SplitWriters(folder, parent.columns, parent.split_rule, options.rows_per_shard, stack)
        self._rows: list[GoodRow] = []
        self._num_known_sources = self._num_repeated = self._num_near_duplicates = 0
        self._endpoint_url = options.endpoint_url

    def read(self, sources: Sequence[str | Path]) -> None:
        """Read the rows that are to be added."""
        known = {source.sha256 for source in self._parent.sources}
        new = []
        for source in sources:
            with local_copy(source, self._endpoint_url) as path, local_errors(path):
                is_known = path.is_file() and sha256_of(path) in known
            self._num_known_sources += is_known
            if not is_known:
                new.append(source)
        for source in new:
            self._rows += self._ingest.read(source)
        if new:
            self._ingest.check_bad_row_share()
        if self._rows:
            self._drop_repeated()
            self._drop_near_duplicates()

    def _drop_repeated(self) -> None:
        """Drop rows whose texts are in the parent or in an earlier new row."""
        known = np.concatenate([_hashes(texts) for _, texts in self._parent_rows()] or [np.empty(0, np.uint64)])
        new = np.array([row_hash(row.values[: self._writers.num_texts]) for row in self._rows], dtype=np.uint64)
        is_first = np.zeros(len(new), dtype=np.bool_)
        is_first[np.unique(new, return_index=True)[1]] = True
        is_added = is_first & ~np.isin(new, known)
        self._num_repeated = int((~is_added).sum())
        self._rows = [row for row, keep in zip(self._rows, is_added, strict=True) if keep]

    def _drop_near_duplicates(self) -> None:
        """Drop new rows that leak answers: near-duplicates of a row on the other side, where train is one side, and
        eval and test are the other. If both rows are new, drop the one in train."""
        train, held_out = _NewRows(), _NewRows()
        for number, row in enumerate(self._rows):
            (train if self._writers.split_of(row) == "train" else held_out).add(number, row)
        dropped: dict[int, str] = {}
        for split, texts in self._parent_rows():
            other_side = held_out if split == "train" else train
            for numbers in other_side.near(texts[0], texts[1]):
                dropped.update(dict.fromkeys(numbers, f"a row in the {split} split"))
        for number, numbers in zip(train.numbers, held_out.near(train.anchors, train.positives), strict=True):
            if not dropped.keys() >= set(numbers):
                dropped.setdefault(number, "a new row in the eval or test split")
        for number, other in sorted(dropped.items()):
            self._ingest.exclude(self._rows[number], "near_copy", f"near-duplicate of {other}")
        self._num_near_duplicates = len(dropped)
        self._rows = [row for number, row in enumerate(self._rows) if number not in dropped]

    def publish(self) -> AppendResult:
        """Publish the new version as the newest. Raises Conflict if its parent is no longer the newest."""
        parent, ingest = self._parent, self._ingest
        self._quarantine.close()
        if not self._rows:
            return self._result(parent, {})
        for row in self._rows:
            self._writers.add(row)
        added = self._writers.finish()
        inherited = {
            split: tuple(shard.model_copy(update={"version": shard.version or parent.version}) for shard in shards)
            for split, shards in parent.splits.items()
        }
        splits = {split: inherited[split] + added[split] for split in inherited}
        num_added = {split: sum(shard.num_rows for shard in added[split]) for split in SPLITS}
        manifest = Manifest(
            dataset=parent.dataset,
            version=content_id(parent.columns, parent.split_rule, splits),
            columns=parent.columns,
            splits=splits,
            split_rule=parent.split_rule,
            num_rows={split: parent.num_rows[split] + num_added[split] for split in SPLITS},
            bad_rows=dict(ingest.bad_rows),
            num_duplicate_rows=parent.num_duplicate_rows,
            num_leaked_rows=parent.num_leaked_rows,
            text_statistics=_combined_statistics(parent, ingest.text_statistics(), len(self._rows)),
            sources=(*parent.sources, *ingest.sources),
            created_at=datetime.now(UTC).replace(microsecond=0),
            parent=parent.version,
            num_repeated_rows=self._num_repeated,
            num_near_copies=self._num_near_duplicates,
        )
        upload(self._storage, manifest, self._writers.paths, self._folder, self._on_progress)
        return self._result(publish(self._storage, manifest, after=parent.version), num_added)

    def _result(self, manifest: Manifest, num_added_rows: dict[str, int]) -> AppendResult:
        return AppendResult(
            manifest,
            num_added_rows,
            self._num_repeated,
            self._num_near_duplicates,
            dict(self._ingest.bad_rows),
            self._ingest.first_bad_rows,
            self._num_known_sources,
        )

    def _parent_rows(self) -> Iterator[tuple[str, list[list[str]]]]:
        """Yield the parent's rows in batches of ROWS_AT_ONCE: (split, texts by column)."""
        from tercet.data.cache import load_split

        columns = list(self._parent.text_columns)
        for split in SPLITS:
            rows = load_split(self._storage, self._parent, split, self._cache_dir, columns)
            for batch in rows.iter(batch_size=ROWS_AT_ONCE):
                yield split, [batch[column] for column in columns]


class _NewRows:
    """The new rows of train, or those of eval and test together, searchable by near-duplicates."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.anchors: list[str] = []
        self.positives: list[str] = []
        self._index: NearDuplicates | None = None

    def add(self, number: int, row: GoodRow) -> None:
        self.numbers.append(number)
        self.anchors.append(row.values[0])
        self.positives.append(row.values[1])

    def near(self, anchors: Sequence[str], positives: Sequence[str]) -> list[list[int]]:
        """For each of the given rows, the numbers of the new rows that are near-duplicates of it."""
        if self._index is None:
            self._index = NearDuplicates()
            self._index.add(self.anchors, self.positives)
        return [[self.numbers[place] for place in places] for places in self._index.find(anchors, positives)]


def _hashes(texts: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    return np.fromiter((row_hash(row) for row in zip(*texts, strict=True)), dtype=np.uint64)


def _check_columns(parent: Manifest, wanted: Mapping[str, str]) -> None:
    if tuple(wanted) != parent.columns:
        raise ConfigError(
            f"the new rows would have the columns {', '.join(wanted)}; {parent.dataset} {parent.version} has "
            f"{', '.join(parent.columns)}",
            "Name the same columns as when the dataset was made.",
        )


def _combined_statistics(
    parent: Manifest, new: Mapping[str, TextStatistics], num_new_rows: int
) -> dict[str, TextStatistics]:
    num_rows = sum(parent.num_rows.values())
    return {
        column: TextStatistics(
            mean_chars=round(
                (before.mean_chars * num_rows + new[column].mean_chars * num_new_rows) / (num_rows + num_new_rows), 2
            ),
            max_chars=max(before.max_chars, new[column].max_chars),
        )
        for column, before in parent.text_statistics.items()
    }
