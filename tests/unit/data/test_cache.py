"""Cached shards: downloaded once, verified, memory-mapped, in order."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from tercet.data.build import build_version
from tercet.data.cache import default_cache_dir, load_split
from tercet.data.ingest import IngestOptions
from tercet.data.manifest import Manifest
from tercet.errors import ConfigError, CorruptObject, DiskFull
from tercet.storage import Storage, open_storage
from tercet.storage.layout import version_prefix

NUM_ROWS = 400


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


@pytest.fixture
def manifest(tmp_path: Path, storage: Storage) -> Manifest:
    rows = [{"anchor": f"q {n}", "positive": f"a {n}", "negative": f"x {n}"} for n in range(NUM_ROWS)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "r.jsonl"
    return build_version([path], storage, "faq", IngestOptions(rows_per_shard=60), fractions=(0.9, 0.1, 0.0)).manifest


@pytest.fixture
def downloads(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the key of each download."""
    keys: list[str] = []
    download = storage.download

    def recorded(key: str, path: Path, sha256: str | None = None) -> None:
        keys.append(key)
        download(key, path, sha256)

    monkeypatch.setattr(storage, "download", recorded)
    return keys


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _stored(storage: Storage, manifest: Manifest, index: int = 0) -> Path:
    return Path(storage.uri_of(f"{version_prefix('faq', manifest.version)}/{manifest.splits['train'][index].path}"))


def test_rows_come_in_shard_order(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    dataset = load_split(storage, manifest, "train", tmp_path / "cache")
    assert len(dataset) == manifest.num_rows["train"] > 300
    assert dataset.column_names == ["anchor", "positive", "negative"]
    numbers = [int(anchor.split()[1]) for anchor in dataset["anchor"]]
    assert numbers == sorted(numbers)  # they were built in this order
    assert dataset[77] == {name: f"{letter} {numbers[77]}" for name, letter in zip(dataset[77], "qax", strict=True)}
    held_out = load_split(storage, manifest, "eval", tmp_path / "cache")
    assert len(held_out) + len(dataset) == NUM_ROWS


def test_columns_are_chosen(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    dataset = load_split(storage, manifest, "train", tmp_path / "cache", columns=["positive", "anchor"])
    assert dataset.column_names == ["positive", "anchor"]
    with pytest.raises(ConfigError, match="no column 'score'") as caught:
        load_split(storage, manifest, "train", tmp_path / "cache", columns=["score"])
    assert "anchor, positive, negative" in caught.value.hint
    with pytest.raises(ConfigError, match="no split 'dev'"):
        load_split(storage, manifest, "dev", tmp_path / "cache")


def test_an_empty_split_is_an_empty_dataset(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    dataset = load_split(storage, manifest, "test", tmp_path / "cache")
    assert len(dataset) == 0
    assert dataset.features == load_split(storage, manifest, "train", tmp_path / "cache").features


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_are_mapped_from_the_arrow_files_not_copied(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    load_split(storage, manifest, "train", tmp_path / "cache")
    gc.collect()  # garbage of earlier tests must not be freed during the measurement
    before = pa.total_allocated_bytes()
    dataset = load_split(storage, manifest, "train", tmp_path / "cache")
    assert pa.total_allocated_bytes() == before
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path / "cache" / "shards") in line and line.endswith(".arrow"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            mapped.append(range(start, end))
    chunks = [chunk for column in dataset.data.columns for chunk in column.chunks]
    assert len(chunks) >= 3 * len(manifest.splits["train"])
    for chunk in chunks:
        text = chunk.buffers()[2]
        assert any(text.address in addresses for addresses in mapped)


def test_pickles_carry_paths_and_fingerprints_are_fixed(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    dataset = load_split(storage, manifest, "train", tmp_path / "cache")
    data = pickle.dumps(dataset)
    assert b"q 1" not in data
    assert pickle.loads(data)[5] == dataset[5]
    again = load_split(storage, manifest, "train", tmp_path / "other cache")
    assert again._fingerprint == dataset._fingerprint
    fewer = load_split(storage, manifest, "train", tmp_path / "cache", columns=["anchor", "positive"])
    other = load_split(storage, manifest, "eval", tmp_path / "cache")
    assert len({dataset._fingerprint, fewer._fingerprint, other._fingerprint}) == 3


def test_shards_are_downloaded_once(tmp_path: Path, storage: Storage, manifest: Manifest, downloads: list[str]) -> None:
    together = threading.Barrier(8, timeout=120)

    def work(_: int) -> int:
        together.wait()
        return len(load_split(storage, manifest, "train", tmp_path / "cache"))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {manifest.num_rows["train"]}
    assert len(downloads) == len(set(downloads)) == len(manifest.splits["train"])
    load_split(storage, manifest, "train", tmp_path / "cache")
    assert len(downloads) == len(manifest.splits["train"])
    left = {path.suffix for path in (tmp_path / "cache" / "shards").iterdir()}
    assert left == {".arrow", ".lock"}, "what was downloaded is not kept beside what is mapped"


WORKER = """
import os, sys, pathlib
from tercet.data.cache import load_split
from tercet.data.versions import read_manifest
from tercet.storage import Storage, open_storage

download = Storage.download
def recorded(self, key, path, sha256=None):
    with open(sys.argv[3], "a") as log:
        log.write(key + "\\n")
    download(self, key, path, sha256)
Storage.download = recorded
storage = open_storage(sys.argv[1])
sys.stdin.read(1)
load_split(storage, read_manifest(storage, "faq"), "train", pathlib.Path(sys.argv[2]))
"""


def test_processes_that_start_together_download_once(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    log = tmp_path / "downloads"
    command = [sys.executable, "-c", WORKER, storage.uri, str(tmp_path / "cache"), str(log)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(8)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()  # go
    assert [worker.wait(timeout=500) for worker in workers] == [0] * 8
    assert len(log.read_text().splitlines()) == len(manifest.splits["train"])


def test_versions_share_cached_shards(
    tmp_path: Path, storage: Storage, manifest: Manifest, downloads: list[str]
) -> None:
    load_split(storage, manifest, "train", tmp_path / "cache")
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('\n{"anchor": "more", "positive": "m", "negative": "x"}')
    newer = build_version(
        [tmp_path / "r.jsonl"], storage, "faq", IngestOptions(rows_per_shard=60), fractions=(0.9, 0.1, 0.0)
    ).manifest
    assert newer.version != manifest.version
    del downloads[:]
    load_split(storage, newer, "train", tmp_path / "cache")
    assert len(downloads) <= 1


def test_a_damaged_arrow_file_is_made_again(
    tmp_path: Path, storage: Storage, manifest: Manifest, downloads: list[str]
) -> None:
    load_split(storage, manifest, "train", tmp_path / "cache")
    first, second, *_ = sorted((tmp_path / "cache" / "shards").glob("*.arrow"))
    whole, seen = (first.read_bytes(), second.read_bytes()), first.stat()
    _damage(first)
    os.utime(first, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # a failing disk does not change the time stamps
    os.truncate(second, 100)
    del downloads[:]
    dataset = load_split(storage, manifest, "train", tmp_path / "cache")
    assert (first.read_bytes(), second.read_bytes()) == whole
    assert len(dataset["anchor"]) == manifest.num_rows["train"]
    assert len(downloads) == 2


def test_a_damaged_shard_in_storage_is_corrupt(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    _damage(_stored(storage, manifest, 1))
    with pytest.raises(CorruptObject, match="train-00001-of"):
        load_split(storage, manifest, "train", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "shards").glob(f"*{manifest.splits['train'][1].sha256}.[pa]*"))


def test_a_missing_shard_is_corrupt(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    _stored(storage, manifest).unlink()
    with pytest.raises(CorruptObject, match=r"missing, but the manifest lists it"):
        load_split(storage, manifest, "train", tmp_path / "cache")


def test_a_kill_during_conversion_leaves_no_usable_file(
    tmp_path: Path, storage: Storage, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tercet.data.cache.hash_of", killed)
        with pytest.raises(KeyboardInterrupt):
            load_split(storage, manifest, "train", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "shards").glob("*.arrow"))
    assert len(load_split(storage, manifest, "train", tmp_path / "cache")) == manifest.num_rows["train"]
    assert not [*(tmp_path / "cache" / "shards").glob("*.partial"), *(tmp_path / "cache" / "shards").glob("*.parquet")]


def test_a_full_disk_is_reported(
    tmp_path: Path, storage: Storage, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tercet.data.cache._write_arrow", full)
    with pytest.raises(DiskFull, match="No space left"):
        load_split(storage, manifest, "train", tmp_path / "cache")


def test_the_rest_of_a_killed_download_is_removed(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    folder = tmp_path / "cache" / "shards"
    folder.mkdir(parents=True)
    (folder / f".{manifest.splits['train'][0].sha256}.parquet.0123.tmp").write_bytes(b"half")
    load_split(storage, manifest, "train", tmp_path / "cache")
    assert not list(folder.glob(".*.tmp"))


def test_the_cache_folder_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("TERCET_CACHE_DIR")
    assert default_cache_dir() == Path.home() / ".cache" / "tercet"


def test_an_impossible_cache_folder_is_an_error(tmp_path: Path, storage: Storage, manifest: Manifest) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_split(storage, manifest, "train", tmp_path / "file")
    assert "TERCET_CACHE_DIR" in caught.value.hint
