"""New rows onto a dataset: the version before, and shards of what it does not have.

    sources → checked rows → not there already → no near copy across the splits → new shards → version → HEAD

The new version lists the shards of the one before where they lie, and adds its own: what is there is neither read into
training anew nor copied. Each row has the split that a hash of its group (or anchor) gives it, for ever. Of several
appenders at once each adds to what the one before it published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tercet.data.ingest import TRIPLET, GoodRow, Ingest, Progress, check_sources, wanted_columns
from tercet.data.manifest import SPLITS, Manifest, TextStatistics, content_id
from tercet.data.near_duplicates import NearCopies
from tercet.data.readers import local_copy
from tercet.data.row_checks import MAX_TEXT_CHARS, is_text, row_hash
from tercet.data.shard_writer import SplitWriters, upload
from tercet.data.versions import publish, read_manifest
from tercet.errors import ConfigError, Conflict
from tercet.storage import Storage
from tercet.storage.base import local_errors, sha256_of

ATTEMPTS = 20  # each of them adds to another version, because somebody else published one
ROWS_AT_ONCE = 8_192


@dataclass(frozen=True)
class AppendResult:
    """What became of the sources."""

    manifest: Manifest
    """The newest version: the one before where nothing was added."""
    num_added_rows: dict[str, int]
    """By split; empty where nothing was added."""
    num_repeated_rows: int
    num_near_copies: int
    bad_rows: dict[str, int]
    first_bad_rows: tuple[str, ...]
    num_known_sources: int
    """Files that were read into an earlier version, byte for byte; they were not read again."""

    @property
    def is_new(self) -> bool:
        """Whether there is a new version."""
        return bool(self.num_added_rows)

    def text(self) -> str:
        """In words."""
        added = ", ".join(f"{split} {num:,}" for split, num in self.num_added_rows.items())
        left = {
            "there already": self.num_repeated_rows,
            "near copies across the splits": self.num_near_copies,
            "bad": sum(self.bad_rows.values()),
        }
        lines = [f"added {added} rows" if added else "nothing new"]
        lines += [f"{num:,} rows {what}" for what, num in left.items() if num]
        if self.num_known_sources:
            lines.append(f"{self.num_known_sources:,} files were read before")
        return "; ".join(lines)


def append(
    sources: Sequence[str | Path],
    storage: Storage,
    name: str,
    columns: Mapping[str, str] = TRIPLET,
    group: str | None = None,
    slices: Sequence[str] = (),
    max_bad_rows: float = 0.01,
    rows_per_shard: int = 65_536,
    max_text_chars: int = MAX_TEXT_CHARS,
    on_progress: Callable[[Progress], None] | None = None,
    endpoint_url: str | None = None,
    cache_dir: Path | None = None,
) -> AppendResult:
    """Add the rows of files, or `s3://` URIs, that dataset `name` does not have, as a new version. Arguments as those
    of `shards.build_version`.

    Raises DatasetNotFound where there is no version to add to, ConfigError where its columns are others, Conflict where
    others kept publishing, and what `build_version` raises; then nothing was published. Holds the new rows in memory,
    and 8 bytes for each row of the version before, all of which it reads."""
    wanted = wanted_columns(columns, group, slices)
    check_sources(sources, max_bad_rows)
    with tempfile.TemporaryDirectory(prefix="tercet-append-") as temporary:
        for attempt in range(ATTEMPTS):
            folder = Path(temporary) / str(attempt)
            folder.mkdir()
            parent = read_manifest(storage, name)
            _check_columns(parent, wanted)
            try:
                with ExitStack() as stack:
                    work = _Append(storage, parent, folder, wanted, max_text_chars, cache_dir, stack)
                    work.read(sources, endpoint_url, max_bad_rows, on_progress)
                    return work.publish(rows_per_shard, on_progress)
            except Conflict:
                continue
    raise Conflict(
        f"{name} got {ATTEMPTS} other versions while rows were added to it",
        "Several publishers are writing this dataset; append again, nothing is lost.",
    )


class _Append:
    """One attempt to add rows to one version."""

    def __init__(
        self,
        storage: Storage,
        parent: Manifest,
        folder: Path,
        wanted: Mapping[str, str],
        max_text_chars: int,
        cache_dir: Path | None,
        stack: ExitStack,
    ) -> None:
        self._storage, self._parent, self._folder, self._cache_dir = storage, parent, folder, cache_dir
        self._stack = stack
        self._quarantine = stack.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))
        self._intake = Ingest(wanted, self._quarantine, max_text_chars)
        self._num_texts = sum(map(is_text, wanted))
        self._key = list(wanted).index(parent.split_rule.by)
        self._rows: list[GoodRow] = []
        self._num_known_sources = self._num_repeated = self._num_near_copies = 0

    def read(
        self,
        sources: Sequence[str | Path],
        endpoint_url: str | None,
        max_bad_rows: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        """Take in the rows that are to be added."""
        known = {source.sha256 for source in self._parent.sources}
        new = []
        for source in sources:
            with local_copy(source, endpoint_url) as path, local_errors(path):
                is_known = path.is_file() and sha256_of(path) in known
            self._num_known_sources += is_known
            if not is_known:
                new.append(source)
        for source in new:
            self._rows += self._intake.read(source, endpoint_url, on_progress)
        if new:
            self._intake.check_bad_row_share(max_bad_rows)
        if self._rows:
            self._leave_out_repeated()
            self._leave_out_near_copies()

    def _leave_out_repeated(self) -> None:
        there = np.concatenate([_hashes(texts) for _, texts in self._parent_rows()] or [np.empty(0, np.uint64)])
        own = np.array([row_hash(row.values[: self._num_texts]) for row in self._rows], dtype=np.uint64)
        is_first = np.zeros(len(own), dtype=np.bool_)
        is_first[np.unique(own, return_index=True)[1]] = True
        is_new = is_first & ~np.isin(own, there)
        self._num_repeated = int((~is_new).sum())
        self._rows = [row for row, keep in zip(self._rows, is_new, strict=True) if keep]

    def _leave_out_near_copies(self) -> None:
        """A new row of one side that is a near copy of a row on the other gives answers away. Of two new ones, that of
        train is left out."""
        sides: dict[bool, list[int]] = {True: [], False: []}
        for number, row in enumerate(self._rows):
            sides[self._is_train(self._split_of(row))].append(number)
        indexes = {side: NearCopies() for side in sides}
        for side, numbers in sides.items():
            indexes[side].add(*self._pairs(numbers))
        left_out: dict[int, str] = {}
        for split, texts in self._parent_rows():
            side = not self._is_train(split)
            for found in indexes[side].find(texts[0], texts[1]):
                left_out.update({sides[side][number]: f"a row of the {split} split" for number in found})
        for number, found in zip(sides[True], indexes[False].find(*self._pairs(sides[True])), strict=True):
            if any(sides[False][other] not in left_out for other in found):
                left_out.setdefault(number, "a new row that is held out")
        for number, what in sorted(left_out.items()):
            row = self._rows[number]
            detail = f"nearly the same as {what}, which is on the other side"
            self._intake.set_aside(row.source, row.line, "near_copy", detail, " | ".join(row.values))
        self._num_near_copies = len(left_out)
        self._rows = [row for number, row in enumerate(self._rows) if number not in left_out]

    def publish(self, rows_per_shard: int, on_progress: Callable[[Progress], None] | None) -> AppendResult:
        """Make it the newest version. Raises Conflict where the version it adds to is not that any more."""
        parent, intake = self._parent, self._intake
        self._quarantine.close()
        if not self._rows:
            return self._result(parent, {})
        writers = SplitWriters(self._folder, parent.columns, parent.split_rule, rows_per_shard, self._stack)
        for row in self._rows:
            writers.add(row)
        added = writers.finish()
        splits = {
            split: (*(shard.model_copy(update={"version": shard.version or parent.version}) for shard in shards),)
            + added[split]
            for split, shards in parent.splits.items()
        }
        num_added = {split: sum(shard.num_rows for shard in added[split]) for split in SPLITS}
        manifest = Manifest(
            dataset=parent.dataset,
            version=content_id(parent.columns, parent.split_rule, splits),
            columns=parent.columns,
            splits=splits,
            split_rule=parent.split_rule,
            num_rows={split: parent.num_rows[split] + num_added[split] for split in SPLITS},
            bad_rows=dict(intake.bad_rows),
            num_duplicate_rows=parent.num_duplicate_rows,
            num_leaked_rows=parent.num_leaked_rows,
            text_statistics=_together(parent, intake.text_statistics(), len(self._rows)),
            sources=(*parent.sources, *intake.sources),
            created_at=datetime.now(UTC).replace(microsecond=0),
            parent=parent.version,
            num_repeated_rows=self._num_repeated,
            num_near_copies=self._num_near_copies,
        )
        upload(self._storage, manifest, writers.paths, self._folder, on_progress)
        return self._result(publish(self._storage, manifest, after=parent.version), num_added)

    def _result(self, manifest: Manifest, num_added_rows: dict[str, int]) -> AppendResult:
        return AppendResult(
            manifest,
            num_added_rows,
            self._num_repeated,
            self._num_near_copies,
            dict(self._intake.bad_rows),
            self._intake.first_bad_rows,
            self._num_known_sources,
        )

    def _split_of(self, row: GoodRow) -> str:
        return self._parent.split_rule.split_of(row.values[self._key])

    @staticmethod
    def _is_train(split: str) -> bool:
        return split == "train"

    def _pairs(self, numbers: Sequence[int]) -> tuple[list[str], list[str]]:
        return [self._rows[n].values[0] for n in numbers], [self._rows[n].values[1] for n in numbers]

    def _parent_rows(self) -> Iterator[tuple[str, list[list[str]]]]:
        """(split, texts by column) of a few thousand rows at a time."""
        from tercet.data.cache import load_split

        columns = list(self._parent.text_columns)
        for split in SPLITS:
            rows = load_split(self._storage, self._parent, split, self._cache_dir, columns)
            for batch in rows.iter(batch_size=ROWS_AT_ONCE):
                yield split, [batch[column] for column in columns]


def _hashes(texts: Sequence[Sequence[str]]) -> NDArray[np.uint64]:
    return np.fromiter((row_hash(row) for row in zip(*texts, strict=True)), dtype=np.uint64)


def _check_columns(parent: Manifest, wanted: Mapping[str, str]) -> None:
    if tuple(wanted) != parent.columns:
        raise ConfigError(
            f"the new rows would have the columns {', '.join(wanted)}; {parent.dataset} {parent.version} has "
            f"{', '.join(parent.columns)}",
            "Name the columns as they were named when the dataset was made.",
        )


def _together(parent: Manifest, new: Mapping[str, TextStatistics], num_new_rows: int) -> dict[str, TextStatistics]:
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
