"""Write rows to Parquet shards, in bounded memory and with the same bytes for the same rows, and upload them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tercet.data.ingest import GoodRow, OnProgress, Progress
from tercet.data.manifest import SPLITS, Manifest, Shard, SplitRule
from tercet.data.row_checks import is_text
from tercet.storage import Storage, layout
from tercet.storage.base import sha256_of

ROW_GROUP_ROWS = 8_192
ROW_GROUP_CHARS = 32 << 20
"""A row group ends at either limit, so memory is bounded for long texts too."""


class ShardWriter:
    """Writes the rows of one split, in order, to files of `rows_per_shard` rows (the last may have fewer).

    The files are zstd Parquet with page checksums; all columns are text. With one version of pyarrow, equal rows give
    equal bytes. Holds one row group in memory.
    """

    def __init__(self, folder: Path, split: str, columns: tuple[str, ...], rows_per_shard: int) -> None:
        self._folder, self._split, self._columns, self._rows_per_shard = folder, split, columns, rows_per_shard
        self._rows: list[Sequence[str]] = []
        self._num_chars = 0
        self._num_in_shard = 0
        self._writer: Any = None
        self._written: list[tuple[Path, int]] = []
        self.paths: dict[str, Path] = {}
        """Path in the version → local file, of each shard; filled by `finish`."""

    def add(self, row: Sequence[str]) -> None:
        """Write one row; its values are in the order of the columns."""
        self._rows.append(row)
        self._num_chars += sum(map(len, row))
        self._num_in_shard += 1
        full = self._num_in_shard == self._rows_per_shard
        if full or len(self._rows) == ROW_GROUP_ROWS or self._num_chars >= ROW_GROUP_CHARS:
            self._write_row_group()
        if full:
            self._end_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Write the remaining rows. Return the shards in row order; none if there were no rows."""
        if self._rows:
            self._write_row_group()
        if self._num_in_shard:
            self._end_shard()
        shards = []
        for index, (path, num_rows) in enumerate(self._written):
            key = layout.shard_path(self._split, index, len(self._written))
            self.paths[key] = path
            shards.append(Shard(path=key, num_rows=num_rows, num_bytes=path.stat().st_size, sha256=sha256_of(path)))
        return tuple(shards)

    def close(self) -> None:
        """Close a file that is still open after a failed build."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_row_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([pa.field(column, pa.string(), nullable=False) for column in self._columns])
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._folder / f"{self._split}-{len(self._written):05d}.parquet",
                schema,
                compression="zstd",
                write_page_checksum=True,
            )
        arrays = [pa.array(values, pa.string()) for values in zip(*self._rows, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=ROW_GROUP_ROWS)
        self._rows, self._num_chars = [], 0

    def _end_shard(self) -> None:
        self.close()
        path = self._folder / f"{self._split}-{len(self._written):05d}.parquet"
        self._written.append((path, self._num_in_shard))
        self._num_in_shard = 0


_UPLOADS_AT_ONCE = 8


class SplitWriters:
    """Writes each row to the shards of its split, in a temporary folder."""

    def __init__(
        self, folder: Path, columns: tuple[str, ...], rule: SplitRule, rows_per_shard: int, stack: ExitStack
    ) -> None:
        """stack: closes the files if the build fails."""
        self._rule, self._key = rule, columns.index(rule.by)
        self.num_texts = sum(map(is_text, columns))
        """Number of text columns; they come before the labels."""
        self._writers = {split: ShardWriter(folder, split, columns, rows_per_shard) for split in SPLITS}
        for writer in self._writers.values():
            stack.callback(writer.close)

    def split_of(self, row: GoodRow) -> str:
        """Return the split that a row belongs to."""
        return self._rule.split_of(row.values[self._key])

    def add(self, row: GoodRow) -> None:
        """Write a row to its split."""
        self._writers[self.split_of(row)].add(row.values)

    def finish(self) -> dict[str, tuple[Shard, ...]]:
        """Write the remaining rows. Return the shards of each split."""
        return {split: self._writers[split].finish() for split in SPLITS}

    @property
    def paths(self) -> dict[str, Path]:
        """Path in the version → local file, of each shard; filled by `finish`."""
        return {key: path for writer in self._writers.values() for key, path in writer.paths.items()}


def upload(
    storage: Storage,
    manifest: Manifest,
    paths: Mapping[str, Path],
    folder: Path,
    on_progress: OnProgress | None,
) -> None:
    """Upload a version's shards, and the quarantine in `folder` unless it is empty."""
    prefix, quarantine = layout.version_prefix(manifest.dataset, manifest.version), folder / "quarantine.jsonl"
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        uploads = [pool.submit(storage.upload, path, f"{prefix}/{key}") for key, path in paths.items()]
        try:
            for done, finished in enumerate(uploads, start=1):
                finished.result()
                if on_progress is not None:
                    on_progress(Progress("upload", done, len(uploads), manifest.num_bad_rows))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if quarantine.stat().st_size:
        storage.upload(quarantine, layout.quarantine_key(manifest.dataset, manifest.version))
