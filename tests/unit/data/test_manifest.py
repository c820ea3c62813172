"""Versions are named by content, visible whole or not at all, and HEAD survives races."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tercet.data import versions
from tercet.data.manifest import SPLIT_SALT, Manifest, Shard, SplitRule, content_id
from tercet.data.versions import list_datasets, list_versions, publish, read_head, read_manifest
from tercet.errors import Conflict, CorruptObject, DataError, DatasetNotFound, StorageUnavailable
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal
from tercet.storage.layout import dataset_prefix, version_prefix

RULE = SplitRule(by="anchor", salt="s", fractions=(0.8, 0.1, 0.1))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


def _manifest(number: int = 0, dataset: str = "faq", **change: Any) -> Manifest:
    columns = ("anchor", "positive")
    shard = Shard(path="shards/train-00000-of-00001.parquet", num_rows=number, num_bytes=9, sha256=f"{number:064}")
    splits: dict[str, tuple[Shard, ...]] = {"train": (shard,), "eval": (), "test": ()}
    values: dict[str, Any] = {
        "dataset": dataset,
        "version": content_id(columns, RULE, splits),
        "columns": columns,
        "splits": splits,
        "split_rule": RULE,
        "num_rows": {"train": number, "eval": 0, "test": 0},
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Manifest(**{**values, **change})


def test_a_published_version_is_read_back(storage: Storage) -> None:
    manifest = _manifest(1, bad_rows={"blank": 2})
    assert publish(storage, manifest) == manifest
    assert read_manifest(storage, "faq") == read_manifest(storage, "faq", manifest.version) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    assert manifest.num_bad_rows == 2
    assert list_datasets(storage) == ["faq"]


def test_content_ids_never_change_between_versions() -> None:
    """A version that another tercet published must still match its id."""

    def shard(split: str, number: int, version: str | None = None) -> Shard:
        path = f"shards/{split}-00000-of-00001.parquet"
        return Shard(path=path, num_rows=number, num_bytes=9, sha256=f"{number:064}", version=version)

    columns = ("anchor", "positive", "negative", "group")
    rule = SplitRule(by="group", salt=SPLIT_SALT, fractions=(0.8, 0.1, 0.1))
    built = {"train": (shard("train", 1),), "eval": (), "test": (shard("test", 2),)}
    appended = {
        "train": (shard("train", 1, version="5d0d03e"), shard("train", 3)),
        "eval": (),
        "test": (shard("test", 2, version="5d0d03e"),),
    }
    assert content_id(columns, rule, built) == "43d0aa25d4d0ed41"
    assert content_id(columns, rule, appended) == "578ac06bb5eb9327"


def test_publishing_again_keeps_the_first_and_does_not_move_head(storage: Storage) -> None:
    first = publish(storage, _manifest(1))
    head = storage.read("datasets/faq/HEAD.json")
    again = publish(storage, _manifest(1, created_at=datetime(2027, 1, 1, tzinfo=UTC)))
    assert again == first
    assert storage.read("datasets/faq/HEAD.json") == head


def test_head_names_the_last_published(storage: Storage) -> None:
    first, second = _manifest(1), _manifest(2)
    publish(storage, first)
    publish(storage, second)
    assert read_manifest(storage, "faq") == second
    publish(storage, first)  # a rollback publishes an earlier version
    assert read_head(storage, "faq") == first.version
    assert json.loads(storage.read("datasets/faq/HEAD.json"))["generation"] == 3


def test_without_a_manifest_there_is_no_version(storage: Storage) -> None:
    storage.put("datasets/faq/versions/abc/shards/train-00000-of-00001.parquet", b"rows")
    assert list_versions(storage, "faq") == []
    assert list_datasets(storage) == []
    with pytest.raises(DatasetNotFound):
        read_manifest(storage, "faq", "abc")


def test_all_racing_publishers_succeed(storage: Storage) -> None:
    manifests = [_manifest(number) for number in range(6)]
    together = threading.Barrier(6, timeout=120)

    def work(manifest: Manifest) -> None:
        together.wait()
        publish(storage, manifest)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, manifests))
    assert list_versions(storage, "faq") == sorted(manifest.version for manifest in manifests)
    head = json.loads(storage.read("datasets/faq/HEAD.json"))
    assert head["generation"] == 6  # no swap was lost
    assert head["version"] in list_versions(storage, "faq")


def test_a_lost_race_is_tried_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(storage, _manifest(1))
    swap, rival = storage.compare_and_swap, _manifest(3)

    def interrupted(key: str, data: bytes, token: str | None) -> str:
        monkeypatch.setattr(storage, "compare_and_swap", swap)
        publish(storage, rival)
        return swap(key, data, token)

    monkeypatch.setattr(storage, "compare_and_swap", interrupted)
    publish(storage, _manifest(2))
    assert json.loads(storage.read("datasets/faq/HEAD.json"))["generation"] == 3
    assert read_head(storage, "faq") == _manifest(2).version


def test_endless_conflicts_end_in_an_error(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise Conflict("no")

    monkeypatch.setattr(storage, "compare_and_swap", refuse)
    monkeypatch.setattr(versions.time, "sleep", lambda _: None)
    with pytest.raises(Conflict, match="changed 20 times"):
        publish(storage, _manifest(1))


def test_a_kill_before_head_leaves_the_old_head(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(storage, _manifest(1))

    def gone(*_: object) -> str:
        raise StorageUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", gone)
        with pytest.raises(StorageUnavailable):
            publish(storage, _manifest(2))
    assert read_manifest(storage, "faq") == _manifest(1)
    publish(storage, _manifest(2))
    assert read_manifest(storage, "faq") == _manifest(2)


def test_not_found_lists_what_exists(storage: Storage) -> None:
    with pytest.raises(DatasetNotFound) as caught:
        read_manifest(storage, "faq")
    assert "no dataset" in caught.value.hint
    publish(storage, _manifest(1))
    publish(storage, _manifest(1, dataset="other"))
    with pytest.raises(DatasetNotFound) as caught:
        read_manifest(storage, "fqa")
    assert "Did you mean 'faq'?" in caught.value.hint
    assert "other" in caught.value.hint
    with pytest.raises(DatasetNotFound) as caught:
        read_manifest(storage, "faq", "0123")
    assert "no version '0123'" in caught.value.message
    assert _manifest(1).version in caught.value.hint


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 1}\n'])
def test_a_damaged_manifest_or_head_is_corrupt(storage: Storage, damage: bytes) -> None:
    version = publish(storage, _manifest(1)).version
    storage.put(f"{version_prefix('faq', version)}/manifest.json", damage)
    with pytest.raises(CorruptObject, match=r"manifest\.json is damaged"):
        read_manifest(storage, "faq")
    storage.put("datasets/faq/HEAD.json", damage)
    with pytest.raises(CorruptObject, match=r"HEAD\.json cannot be read"):
        read_manifest(storage, "faq")


def test_a_manifest_that_was_changed_is_corrupt(storage: Storage) -> None:
    version = publish(storage, _manifest(1)).version
    key = f"{version_prefix('faq', version)}/manifest.json"
    storage.put(key, storage.read(key).replace(b'"train": 1', b'"train": 2'))  # the id does not cover num_rows
    with pytest.raises(CorruptObject, match="its sha256 is not the one"):
        read_manifest(storage, "faq")
    assert publish(storage, _manifest(1)) == _manifest(1) == read_manifest(storage, "faq")  # replaces the damaged one


@pytest.mark.parametrize("of", [_manifest(2), _manifest(1, dataset="other")])
def test_the_manifest_of_another_version_is_corrupt(storage: Storage, of: Manifest) -> None:
    version = publish(storage, _manifest(1)).version
    storage.put(f"{version_prefix('faq', version)}/manifest.json", seal(of))
    with pytest.raises(CorruptObject, match=f"describes {of.dataset} with other content"):
        read_manifest(storage, "faq")


def test_the_version_must_be_the_id_of_its_content(storage: Storage) -> None:
    with pytest.raises(DataError, match="describes content"):
        publish(storage, _manifest(1, version="mine"))
    assert storage.list("") == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "../x", "-x", "é", "x" * 129, "a\n"])
def test_names_that_cannot_be_keys_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot name"):
        dataset_prefix(name)
    with pytest.raises(DataError, match="cannot name"):
        version_prefix("faq", name)


def test_the_import_is_light() -> None:
    heavy = "{'numpy', 'pyarrow', 'datasets', 'torch', 'ray', 'pandas'}"
    modules = "manifest, versions, readers, row_checks, build, cache"
    code = f"import sys; from tercet.data import {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
