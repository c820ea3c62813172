"""Cache shards on this machine: downloaded once, verified, memory-mapped.

    <cache>/shards/<sha256>.<xxh3>.arrow    the rows of a Parquet shard as an Arrow stream, to be memory-mapped
    <cache>/shards/<sha256>.lock            held while the Arrow file is made

Files are named by content, so versions share the shards that they have in common. If several processes need a shard at
once, one makes the file and the others wait. What is verified, and when:

- Parquet: its sha256, during the download. A mismatch raises CorruptObject. The Parquet file is deleted afterwards.
- Parquet → Arrow: page checksums, and the number of rows.
- Arrow: the hash in its name (64-bit XXH3), each time it is opened. If it differs, for example after a power loss, the
  file is made again. Damage by a failing disk while the file is mapped is not detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.data.manifest import Manifest, Shard
from tercet.errors import ConfigError, CorruptObject, ObjectNotFound
from tercet.storage import Storage
from tercet.storage.base import digest_of, expand_home, local_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from tercet.config.sections import WorkersConfig

SHARDS_AT_ONCE = 8


def default_cache_dir() -> Path:
    """Return `$TERCET_CACHE_DIR`, or `~/.cache/tercet` if it is not set."""
    return Path(os.environ.get("TERCET_CACHE_DIR") or Path.home() / ".cache" / "tercet")


def cache_dir_of(workers: WorkersConfig) -> Path:
    """Return the cache folder of the recipe, or the default."""
    return Path(workers.cache_dir) if workers.cache_dir else default_cache_dir()


def load_split(
    storage: Storage,
    manifest: Manifest,
    split: str,
    cache_dir: Path | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Return a split as a memory-mapped `datasets.Dataset`: rows in shard order, all columns or `columns`, as text.

    Downloads the shards that are not in the cache, 8 at a time. Rows take no memory: pages of the Arrow files are
    loaded when they are read, and shared by all processes of the machine. Pickling the dataset stores paths, not rows.

    Raises CorruptObject if a shard is missing or damaged in storage, ConfigError for an unknown split or column."""
    names = list(manifest.columns if columns is None else columns)
    for column in names:
        if column not in manifest.columns:
            hint = f"{manifest.dataset} {manifest.version} has the columns {', '.join(manifest.columns)}."
            raise ConfigError(f"the dataset has no column {column!r}", hint)
    if split not in manifest.splits:
        raise ConfigError(f"the dataset has no split {split!r}", f"It has {', '.join(manifest.splits)}.")
    paths = _each(_Cache(storage, manifest, cache_dir).path_of, manifest.splits[split])

    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

    pa.default_memory_pool().release_unused()  # each thread's conversion leaves about 100 MB with the allocator
    if paths:
        table = concat_tables([MemoryMappedTable.from_file(str(path)) for path in paths]).select(names)
    else:
        table = InMemoryTable(pa.schema([(name, pa.string()) for name in names]).empty_table())
    fingerprint = hashlib.sha256(json.dumps([manifest.version, split, names]).encode()).hexdigest()[:16]
    return Dataset(table, fingerprint=fingerprint)


def _each(work: Any, shards: Sequence[Shard]) -> list[Path]:
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        futures = [pool.submit(work, shard) for shard in shards]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Cache:
    def __init__(self, storage: Storage, manifest: Manifest, cache_dir: Path | None) -> None:
        self._storage, self._manifest = storage, manifest
        self._folder = expand_home(cache_dir or default_cache_dir()).resolve() / "shards"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the cache folder: {error}", "Set TERCET_CACHE_DIR.") from error

    def path_of(self, shard: Shard) -> Path:
        from filelock import FileLock

        with FileLock(self._folder / f"{shard.sha256}.lock"):
            return self._whole(shard) or self._made(shard)

    def _whole(self, shard: Shard) -> Path | None:
        paths = self._folder.glob(f"{shard.sha256}.*.arrow")
        return next((path for path in paths if path.name == f"{shard.sha256}.{hash_of(path)}.arrow"), None)

    def _made(self, shard: Shard) -> Path:
        for stale in self._folder.glob(f"*{shard.sha256}.*"):  # damaged, or left behind by a killed process
            if stale.suffix != ".lock":
                stale.unlink()
        parquet, partial = (self._folder / f"{shard.sha256}.{suffix}" for suffix in ("parquet", "partial"))
        key = self._manifest.key_of(shard)
        uri = self._storage.uri_of(key)
        try:
            self._storage.download(key, parquet, sha256=shard.sha256)
        except ObjectNotFound as error:
            hint = "Build the version again, or use another one."
            raise CorruptObject(f"{uri} is missing, but the manifest lists it", hint) from error
        with local_errors(partial):
            _write_arrow(parquet, partial, shard.num_rows, uri)
        parquet.unlink()
        return partial.rename(self._folder / f"{shard.sha256}.{hash_of(partial)}.arrow")


def hash_of(path: Path) -> str:
    """Return the 64-bit XXH3 of a file in hex. Detects accidental damage, many times as fast as sha256."""
    import xxhash

    return digest_of(path, xxhash.xxh3_64())


def _write_arrow(parquet: Path, arrow: Path, expected_num_rows: int, uri: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows = 0
    try:
        with pq.ParquetFile(parquet, page_checksum_verification=True, pre_buffer=False) as file:
            schema = pa.schema([(name, pa.string()) for name in file.schema_arrow.names])
            with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in file.iter_batches(batch_size=8192):
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                    num_rows += batch.num_rows
    except pa.ArrowException as error:
        raise CorruptObject(f"{uri} is not a readable shard: {error}", "Build the version again.") from error
    if num_rows != expected_num_rows:
        raise CorruptObject(
            f"{uri} has {num_rows:,} rows, the manifest says {expected_num_rows:,}", "Build the version again."
        )
