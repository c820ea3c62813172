"""A promotion costs the same number of storage requests, however many nights came before it."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import IO

import pytest

from support.published import decision, finished_run
from tercet.artifacts.champion import Champion, history, read_champion
from tercet.artifacts.registry import (
    Index,
    Version,
    list_versions,
    promote,
    read_version,
    register,
    serve,
    versions_of,
)
from tercet.errors import CorruptObject, StorageUnavailable
from tercet.storage import layout
from tercet.storage.base import Fetched
from tercet.storage.documents import seal, sha256, unseal
from tercet.storage.local import LocalStorage


class CountingStorage(LocalStorage):
    """A local folder that counts requests by kind, and listed keys: S3 lists 1,000 keys per request."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: Counter[str] = Counter()

    def exists(self, key: str) -> bool:
        self.requests["exists"] += 1
        return super().exists(key)

    def list(self, prefix: str) -> list[str]:
        keys = super().list(prefix)
        self.requests.update({"list": 1, "keys listed": len(keys)})
        return keys

    def delete(self, prefix: str) -> None:
        self.requests["delete"] += 1
        super().delete(prefix)

    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        self.requests["read"] += 1
        return super()._fetch(key, sink)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        self.requests["write"] += 1
        return super()._write(key, data, expected)


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: thousands of files here need no protection from a power loss."""
    monkeypatch.setattr("tercet.storage.local._sync", lambda path: None)  # noqa: ARG005


@pytest.fixture
def storage(tmp_path: Path) -> CountingStorage:
    return CountingStorage(tmp_path / "storage")


def write_nights(storage: CountingStorage, num_nights: int) -> None:
    """Write what an older tercet, which had no index, left after that many nights, each with a promotion."""
    commit_of, parent, data = finished_run(storage, "r0"), None, b""
    version = register(storage, "m", commit_of, "me")
    for folder in ("by_run", "served", "versions"):
        storage.delete(f"{layout.model_prefix('m')}/{folder}")
    storage.delete(layout.index_key("m"))

    def write(key: str, data: bytes) -> None:
        path = Path(storage.uri_of(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for number in range(1, num_nights + 1):
        lineage = version.lineage.model_copy(update={"run_id": f"r{number}"})
        published = seal(version.model_copy(update={"number": number, "lineage": lineage}))
        write(layout.model_version_key("m", number), published)
        champion = Champion(
            name="m",
            generation=number,
            parent_sha256=parent,
            version=number,
            version_sha256=sha256(published),
            kind="gated",
            reason="better",
            decision=None,
            unix_seconds=float(number),
            who="night",
            nonce=str(number),
        )
        data = seal(champion)
        parent = sha256(data)
        write(layout.generation_key("m", number), data)
    write(layout.champion_key("m"), data)


def night(storage: CountingStorage, run_id: str) -> Counter[str]:
    """Promote a new run and return the requests that this took."""
    lineage = finished_run(storage, run_id)
    storage.requests.clear()
    champion = promote(storage, "m", lineage, lambda _: decision(), "night").champion
    requests = storage.requests.copy()
    assert champion is not None
    assert read_version(storage, "m", champion.version).lineage.run_id == run_id
    return requests


def test_a_promotion_after_1000_nights_costs_what_it_costs_after_10(tmp_path: Path) -> None:
    counts = {}
    for num_nights in (10, 1000):
        storage = CountingStorage(tmp_path / str(num_nights))
        write_nights(storage, num_nights)
        first = night(storage, "new-1")  # makes the index, once
        assert first["read"] > 2 * num_nights
        counts[num_nights] = night(storage, "new-2"), night(storage, "new-3")
        assert len(history(storage, "m")) == num_nights + 3
    assert counts[10][0] == counts[10][1] == counts[1000][0] == counts[1000][1]
    assert counts[10][0] == {"read": 10, "write": 9}


def test_versions_older_than_the_index_are_found(storage: CountingStorage) -> None:
    write_nights(storage, 5)
    gated: list[str] = []

    def again(run_id: str) -> object:
        lineage = finished_run(storage, run_id)
        return promote(storage, "m", lineage, lambda _: gated.append(run_id) or decision(), "night").decision  # type: ignore[func-returns-value]

    assert again("r3") is None  # it was the champion once
    assert gated == []
    assert [version.number for version in versions_of(storage, "m", "r3")] == [3]
    assert versions_of(storage, "m", "r9") == []
    index = unseal(Index, storage.read(layout.index_key("m")), "INDEX.json")
    assert index.newest_version == 5
    assert again("new") is not None
    assert (gated, list_versions(storage, "m")) == (["new"], [1, 2, 3, 4, 5, 6])
    assert again("new") is None


def test_a_damaged_index_is_made_again(storage: CountingStorage) -> None:
    write_nights(storage, 3)
    night(storage, "new-1")
    storage.put(layout.index_key("m"), b"{")
    night(storage, "new-2")
    assert unseal(Index, storage.read(layout.index_key("m")), "INDEX.json").newest_version == 5


def test_the_versions_of_another_run_are_refused(storage: CountingStorage) -> None:
    for run_id in ("r1", "r2"):
        published(storage, run_id)
    storage.put(layout.versions_of_run_key("m", "r1"), storage.read(layout.versions_of_run_key("m", "r2")))
    with pytest.raises(CorruptObject, match="names the versions of run r2"):
        published(storage, "r1")
    storage.delete(layout.versions_of_run_key("m", "r1"))
    storage.delete(layout.index_key("m"))  # as the hint says
    assert published(storage, "r1").number == 1


def test_with_a_broken_chain_every_version_is_read(storage: CountingStorage, caplog: pytest.LogCaptureFixture) -> None:
    write_nights(storage, 4)
    storage.delete(layout.generation_key("m", 2))
    with caplog.at_level(logging.WARNING, "tercet"):
        night(storage, "new-1")
    assert "its index cannot be made" in caplog.text
    assert not storage.exists(layout.index_key("m"))
    assert list_versions(storage, "m") == [1, 2, 3, 4, 5]
    with pytest.raises(CorruptObject, match="is not the champion that generation 3 replaced"):
        promote(storage, "m", finished_run(storage, "r1"), lambda _: decision(), "night")


def published(storage: CountingStorage, run_id: str) -> Version:
    return register(storage, "m", finished_run(storage, run_id), "me")


def test_the_mark_of_a_publisher_that_died_before_its_version_is_ignored(
    storage: CountingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(storage, "r1")

    def die(*_: object) -> None:
        raise StorageUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "put_if_absent", die)
        with pytest.raises(StorageUnavailable):
            published(storage, "r2")
    assert versions_of(storage, "m", "r2") == []
    assert published(storage, "r3").number == 2
    assert versions_of(storage, "m", "r2") == []
    assert published(storage, "r2").number == 3
    assert [version.number for version in versions_of(storage, "m", "r2")] == [3]


def test_an_index_that_lags_behind_costs_a_few_tries(storage: CountingStorage) -> None:
    for run_id in ("r1", "r2", "r3"):
        published(storage, run_id)
    storage.put(layout.index_key("m"), seal(Index(newest_version=1)))  # of a publisher that died after its version
    assert published(storage, "r4").number == 4
    assert published(storage, "r5").number == 5


def test_a_champion_that_was_replaced_is_not_promoted_again(storage: CountingStorage) -> None:
    first = published(storage, "r1")
    serve(storage, first, None, "by hand", "a try", "me")
    night(storage, "r2")
    champion = read_champion(storage, "m")
    shutil.rmtree(storage.uri_of(layout.generation_key("m", 1)).rpartition("/")[0])  # the marks alone say it
    lineage = finished_run(storage, "r1")
    promotion = promote(storage, "m", lineage, lambda _: pytest.fail("it was gated again"), "night")
    assert promotion == (champion, None)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("number", range(9))
def test_a_promotion_that_dies_at_any_write_is_repeated_to_the_same_end(
    storage: CountingStorage, monkeypatch: pytest.MonkeyPatch, number: int, written: bool
) -> None:
    """The process dies before or after one of the nine writes. Another night promotes; then the same command runs."""
    write_nights(storage, 2)
    night(storage, "r-before")
    lineage, writes = finished_run(storage, "r-dies"), Counter[str]()
    write = storage._write

    def die(key: str, data: bytes, expected: str | None) -> str:
        writes["all"] += 1
        if writes["all"] == number + 1 and not written:
            raise KeyboardInterrupt
        try:
            return write(key, data, expected)
        finally:  # some writes find their object there already: then too
            if writes["all"] == number + 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            promote(storage, "m", lineage, lambda _: decision(), "night")
    night(storage, "r-after")
    promote(storage, "m", lineage, lambda _: decision(), "night")
    chain = [read_version(storage, "m", champion.version).lineage.run_id for champion in history(storage, "m")]
    assert sorted(chain) == sorted({*chain}), "a run became the champion twice"
    assert {"r-before", "r-dies", "r-after"} <= {*chain}
    assert promote(storage, "m", lineage, lambda _: pytest.fail("it was gated again"), "night").decision is None
    numbers = [version.number for version in versions_of(storage, "m", "r-dies")]
    assert len(numbers) == 1
