"""The shards on this machine: downloaded once, verified, memory-mapped.

    <cache>/shards/<sha256>.<xxh3>.arrow    the rows of a Parquet file in storage as an Arrow stream, to be mapped
    <cache>/shards/<sha256>.lock            held while it is made

Files are named by content, so versions share the shards they have in common. All processes of a machine may ask at
once: one works, the others wait for it. What is verified when:

- Parquet: sha256 as it comes from storage; a damaged one is CorruptObject. It is not kept.
- Parquet → Arrow: page checksums, and the number of rows.
- Arrow: the hash in its name (XXH3, 64 bits), each time it is opened; where it differs the file is made anew, after a
  loss of power too. What a failing disk does to it while it is mapped is not seen.
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
    """`$TERCET_CACHE_DIR`, or `~/.cache/tercet`."""
    return Path(os.environ.get("TERCET_CACHE_DIR") or Path.home() / ".cache" / "tercet")


def cache_dir_of(workers: WorkersConfig) -> Path:
    """The recipe's, or the default."""
    return Path(workers.cache_dir) if workers.cache_dir else default_cache_dir()


def load_split(
    storage: Storage,
    manifest: Manifest,
    split: str,
    cache_dir: Path | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """A split as a memory-mapped `datasets.Dataset`: rows in shard order, all columns or `columns`, as text.
    Shards that are not in the cache are downloaded, 8 at a time.

    Costs memory for no row: pages come from the Arrow files as they are read, shared by all processes of the
    machine. Pickling it carries paths, not rows. Raises CorruptObject for a shard that is missing or damaged in
    storage, ConfigError for an unknown split or column.
    """
    names = list(manifest.columns if columns is None else columns)
    for column in names:
        if column not in manifest.columns:
            hint = f"Columns of {manifest.dataset} {manifest.version}: {', '.join(manifest.columns)}."
            raise ConfigError(f"the dataset has no column {column!r}", hint)
    if split not in manifest.splits:
        raise ConfigError(f"no split {split!r}", f"Splits: {', '.join(manifest.splits)}.")
    paths = _each(_Cache(storage, manifest, cache_dir).path_of, manifest.splits[split])

    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

    pa.default_memory_pool().release_unused()  # 100 MB that each thread's conversion left with the allocator
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
        return next((path for path in paths if path.name == f"{shard.sha256}.{_hash_of(path)}.arrow"), None)

    def _made(self, shard: Shard) -> Path:
        for left in self._folder.glob(f"*{shard.sha256}.*"):  # damaged, or of a process that was killed
            if left.suffix != ".lock":
                left.unlink()
        parquet, partial = (self._folder / f"{shard.sha256}.{suffix}" for suffix in ("parquet", "partial"))
        key = self._manifest.key_of(shard)
        uri = self._storage.uri_of(key)
        try:
            self._storage.download(key, parquet, sha256=shard.sha256)
        except ObjectNotFound as error:
            hint = "The version lost a shard; build it again, or use another version."
            raise CorruptObject(f"{uri} is missing, but the manifest lists it", hint) from error
        with local_errors(partial):
            _write_arrow(parquet, partial, shard.num_rows, uri)
        parquet.unlink()
        return partial.rename(self._folder / f"{shard.sha256}.{_hash_of(partial)}.arrow")


def _hash_of(path: Path) -> str:
    """XXH3 of a file, 64 bits in hex: finds accidents, many times as fast as sha256."""
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
        raise CorruptObject(f"{uri} is not a shard: {error}", "Build the version again.") from error
    if num_rows != expected_num_rows:
        raise CorruptObject(
            f"{uri} has {num_rows:,} rows, the manifest says {expected_num_rows:,}", "Build the version again."
        )
