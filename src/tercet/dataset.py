"""The shards on this machine: downloaded once, verified, memory-mapped.

    <cache>/shards/<sha256>.parquet         as in storage
    <cache>/shards/<sha256>.<xxh3>.arrow    the same rows as an Arrow stream, which is what is memory-mapped
    <cache>/shards/<sha256>.lock            held while either is made

Files are named by content, so versions share the shards they have in common. All processes of a machine may ask at
once: one works, the others wait for it. What is verified when:

- Parquet: sha256 each time it is fetched, in the cache or not (about 0.1 s per million rows). A damaged file in the
  cache is downloaded again; a damaged one in storage is CorruptObject.
- Parquet → Arrow: page checksums, and the number of rows.
- Arrow: the hash in its name (XXH3, 64 bits), each time it is opened; where it differs the file is made anew. What a
  failing disk does to it while it is mapped is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.errors import ConfigError, CorruptObject, ObjectNotFound
from tercet.manifest import Manifest, Shard
from tercet.storage import Storage, digest_of, sha256_of

if TYPE_CHECKING:
    from datasets import Dataset

    from tercet.sections import WorkersConfig

SHARDS_AT_ONCE = 8


def default_cache_dir() -> Path:
    """`$TERCET_CACHE_DIR`, or `~/.cache/tercet`."""
    return Path(os.environ.get("TERCET_CACHE_DIR") or Path.home() / ".cache" / "tercet")


def cache_dir_of(workers: WorkersConfig) -> Path:
    """The recipe's, or the default."""
    return Path(workers.cache_dir) if workers.cache_dir else default_cache_dir()


def fetch(storage: Storage, manifest: Manifest, split: str, cache_dir: Path | None = None) -> list[Path]:
    """The Parquet files of a split on this machine, in row order; those not in the cache are downloaded, 8 at a time.

    Raises CorruptObject for a shard that is missing or damaged in storage, ConfigError for an unknown split.
    """
    cache = _Cache(storage, manifest, cache_dir)
    return _each(cache.parquet, _shards(manifest, split))


def load_split(
    storage: Storage,
    manifest: Manifest,
    split: str,
    cache_dir: Path | None = None,
    columns: Sequence[str] | None = None,
) -> Dataset:
    """A split as a memory-mapped `datasets.Dataset`: rows in shard order, all columns or `columns`, as text.

    Costs memory for no row: pages come from the Arrow files as they are read, shared by all processes of the
    machine. Pickling it carries paths, not rows. Raises as `fetch`, and ConfigError for an unknown column.
    """
    names = list(manifest.columns if columns is None else columns)
    for column in names:
        if column not in manifest.columns:
            hint = f"Columns of {manifest.dataset} {manifest.version}: {', '.join(manifest.columns)}."
            raise ConfigError(f"the dataset has no column {column!r}", hint)
    shards = _shards(manifest, split)
    cache = _Cache(storage, manifest, cache_dir)
    paths = _each(cache.arrow, shards)

    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable, MemoryMappedTable, concat_tables

    if paths:
        table = concat_tables([MemoryMappedTable.from_file(str(path)) for path in paths]).select(names)
    else:
        table = InMemoryTable(pa.schema([(name, pa.string()) for name in names]).empty_table())
    fingerprint = hashlib.sha256(json.dumps([manifest.version, split, names]).encode()).hexdigest()[:16]
    return Dataset(table, fingerprint=fingerprint)


def _shards(manifest: Manifest, split: str) -> tuple[Shard, ...]:
    if split not in manifest.splits:
        raise ConfigError(f"no split {split!r}", f"Splits: {', '.join(manifest.splits)}.")
    return manifest.splits[split]


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
        self._folder = (cache_dir or default_cache_dir()).expanduser().resolve() / "shards"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the cache folder: {error}", "Set TERCET_CACHE_DIR.") from error

    def parquet(self, shard: Shard) -> Path:
        with self._lock(shard):
            return self._parquet(shard)

    def arrow(self, shard: Shard) -> Path:
        with self._lock(shard):
            found = whole(self._folder, shard.sha256, "arrow")
            return found or _write_arrow(self._parquet(shard), self._folder, shard, self._uri(shard))

    def _parquet(self, shard: Shard) -> Path:
        path = self._folder / f"{shard.sha256}.parquet"
        if path.exists() and path.stat().st_size == shard.num_bytes and sha256_of(path) == shard.sha256:
            return path
        for left in self._folder.glob(f".{path.name}.*.tmp"):  # of a download that was killed; the lock is ours
            left.unlink(missing_ok=True)
        try:
            self._storage.download(self._manifest.key_of(shard), path, sha256=shard.sha256)
        except ObjectNotFound as error:
            hint = "The version lost a shard; build it again, or use another version."
            raise CorruptObject(f"{self._uri(shard)} is missing, but the manifest lists it", hint) from error
        return path

    def _uri(self, shard: Shard) -> str:
        return self._storage.uri_of(self._manifest.key_of(shard))

    def _lock(self, shard: Shard) -> Any:
        from filelock import FileLock

        return FileLock(self._folder / f"{shard.sha256}.lock")


def whole(folder: Path, name: str, suffix: str) -> Path | None:
    """The file `<name>.<hash>.<suffix>` whose bytes have that hash; one that is damaged is deleted."""
    for path in folder.glob(f"{name}.*.{suffix}"):
        if path.name == f"{name}.{hash_of(path)}.{suffix}":
            return path
        path.unlink()
    return None


def hash_of(path: Path) -> str:
    """XXH3 of a file, 64 bits in hex: finds accidents, many times as fast as sha256."""
    import xxhash

    return digest_of(path, xxhash.xxh3_64())


def _write_arrow(parquet_path: Path, folder: Path, shard: Shard, uri: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    partial = folder / f"{shard.sha256}.arrow.partial"
    num_rows = 0
    try:
        with pq.ParquetFile(parquet_path, page_checksum_verification=True, pre_buffer=False) as file:
            schema = pa.schema([(name, pa.string()) for name in file.schema_arrow.names])
            with partial.open("wb") as sink:
                with pa.ipc.new_stream(sink, schema) as writer:
                    for batch in file.iter_batches(batch_size=8192):
                        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                        num_rows += batch.num_rows
                sink.flush()
                os.fsync(sink.fileno())
    except pa.ArrowException as error:
        raise CorruptObject(f"{uri} is not a shard: {error}", "Build the version again.") from error
    if num_rows != shard.num_rows:
        raise CorruptObject(
            f"{uri} has {num_rows:,} rows, the manifest says {shard.num_rows:,}", "Build the version again."
        )
    return partial.rename(folder / f"{shard.sha256}.{hash_of(partial)}.arrow")
