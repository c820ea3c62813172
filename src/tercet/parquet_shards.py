"""Writing the Parquet files of one split: bounded memory, and the same bytes for the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet.manifest import Shard
from tercet.storage import sha256_of

ROW_GROUP_ROWS = 8_192
ROW_GROUP_CHARS = 32 << 20
"""A row group ends at either, so memory is bounded for long texts too."""


class ShardWriter:
    """Takes the rows of one split in order, and cuts them into files of `rows_per_shard` rows (the last has fewer).

    The files are zstd Parquet with page checksums, all columns text. Equal rows give equal bytes under one version
    of pyarrow. Holds one row group in memory.
    """

    def __init__(self, folder: Path, split: str, columns: tuple[str, ...], rows_per_shard: int) -> None:
        self._folder, self._split, self._columns, self._rows_per_shard = folder, split, columns, rows_per_shard
        self._rows: list[Sequence[str]] = []
        self._num_chars = 0
        self._num_in_shard = 0
        self._writer: Any = None
        self._written: list[tuple[Path, int]] = []
        self.paths: dict[str, Path] = {}
        """Once finished: the shard's path in the version → the local file."""

    def add(self, row: Sequence[str]) -> None:
        """Append one row, its values in the order of the columns."""
        self._rows.append(row)
        self._num_chars += sum(map(len, row))
        self._num_in_shard += 1
        full = self._num_in_shard == self._rows_per_shard
        if full or len(self._rows) == ROW_GROUP_ROWS or self._num_chars >= ROW_GROUP_CHARS:
            self._write_row_group()
        if full:
            self._end_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Write what is left; the shards in row order, none where there were no rows."""
        if self._rows:
            self._write_row_group()
        if self._num_in_shard:
            self._end_shard()
        shards = []
        for index, (path, num_rows) in enumerate(self._written):
            key = f"shards/{self._split}-{index:05d}-of-{len(self._written):05d}.parquet"
            self.paths[key] = path
            shards.append(Shard(path=key, num_rows=num_rows, num_bytes=path.stat().st_size, sha256=sha256_of(path)))
        return tuple(shards)

    def close(self) -> None:
        """Let go of a file that is still open; for a build that failed."""
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
