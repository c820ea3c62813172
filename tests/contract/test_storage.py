"""Guarantees of every kind of storage: the same tests on a local folder, moto and a real S3 server."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import tercet.storage.s3
from support.s3_server import FaultyProxy, S3Server, silent_address
from tercet.errors import (
    AccessDenied,
    AlreadyExists,
    BucketNotFound,
    ConfigError,
    Conflict,
    CorruptObject,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from tercet.storage import Storage, open_storage
from tercet.storage.base import sha256_of
from tercet.storage.local import LocalStorage


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Call all in threads that start together. Return their results or exceptions, in order."""
    barrier = threading.Barrier(len(calls))

    def one(call: Callable[[], object]) -> object:
        barrier.wait(timeout=30)
        try:
            return call()
        except StorageError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


class TestReadAndWrite:
    @pytest.mark.on_rgw
    def test_what_was_put_is_read_and_replaced(self, storage: Storage) -> None:
        storage.put("runs/r1/plan.json", b"one")
        assert storage.read("runs/r1/plan.json") == b"one"
        storage.put("runs/r1/plan.json", b"")
        assert storage.read("runs/r1/plan.json") == b""

    def test_absent(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("runs/r1/plan.json", b"one")
        for key in ("nothing", "runs/r1", "runs/r1/plan", "runs/r1/plan.json/below"):
            assert not storage.exists(key)
            with pytest.raises(ObjectNotFound, match=key):
                storage.read(key)
            with pytest.raises(ObjectNotFound):
                storage.read_versioned(key)
            with pytest.raises(ObjectNotFound):
                storage.download(key, tmp_path / "copy")
        assert storage.exists("runs/r1/plan.json")
        assert list(tmp_path.glob("**/copy*")) == []

    def test_uri(self, storage: Storage) -> None:
        assert storage.uri_of("a/b") == f"{storage.uri}/a/b"
        assert storage.uri.startswith(("/", "s3://"))
        assert open_storage(storage.uri + "/").uri == storage.uri

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "a/../../b", "..", ".", "a//b", "./a", "a\n", "a\0b"])
    def test_impossible_keys(self, storage: Storage, key: str) -> None:
        for call in (storage.read, storage.exists, storage.delete, storage.uri_of, storage.read_versioned):
            with pytest.raises(StorageError, match="cannot be a key"):
                call(key)
        with pytest.raises(StorageError, match="cannot be a key"):
            storage.put(key, b"")

    def test_odd_keys(self, storage: Storage) -> None:
        keys = sorted(["ü/é.txt", "a b/c+d%20.json", "x=1&y=2", ".hidden", "#?*[a]"])
        for key in keys:
            storage.put(key, key.encode())
        assert storage.list("") == keys
        assert [storage.read(key).decode() for key in keys] == keys

    def test_a_pickled_storage_works(self, storage: Storage) -> None:
        storage.put("a", b"1")
        copy = pickle.loads(pickle.dumps(storage))
        assert (copy.uri, copy.read("a")) == (storage.uri, b"1")

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns of forking with threads
    def test_after_a_fork(self, storage: Storage) -> None:
        storage.put("a", b"1")
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if storage.read("a") == b"1" else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + 120
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)

    def test_eight_threads_share_one_storage(self, storage: Storage, tmp_path: Path) -> None:
        def work(number: int) -> bool:
            data = bytes([number]) * 300_000
            for turn in range(5):
                key = f"t{number}/{turn}"
                storage.put(key, data)
                storage.download(key, tmp_path / key, hashlib.sha256(data).hexdigest())
                if storage.read(key) != data or (tmp_path / key).read_bytes() != data:
                    return False
            return storage.list(f"t{number}") == [f"t{number}/{turn}" for turn in range(5)]

        assert all(at_once([partial(work, number) for number in range(8)]))


class TestListAndDelete:
    @pytest.mark.on_rgw
    def test_list_is_recursive_sorted_and_by_folder(self, storage: Storage) -> None:
        for key in ("r/10/b", "r/1/z", "r/1/a/deep", "r/1.json", "q"):
            storage.put(key, b"")
        assert storage.list("") == ["q", "r/1.json", "r/1/a/deep", "r/1/z", "r/10/b"]
        assert storage.list("r/1") == storage.list("r/1/") == ["r/1/a/deep", "r/1/z"]
        assert storage.list("none") == storage.list("q") == []

    def test_more_than_a_page(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(s3.new_bucket())
        call = storage._call  # type: ignore[attr-defined]
        for number in range(5):
            storage.put(f"a/{number}", b"")

        def two_a_page(method: str, name: str, **parameters: object) -> object:
            return call(method, name, **parameters, MaxKeys=2)

        monkeypatch.setattr(storage, "_call", two_a_page)
        assert storage.list("a") == [f"a/{number}" for number in range(5)]

    def test_delete_takes_the_folder_and_nothing_else(self, storage: Storage) -> None:
        for key in ("r/10/b", "r/1/z", "r/1/a/deep", "r/2"):
            storage.put(key, b"")
        storage.delete("r/1")
        storage.delete("r/2")
        storage.delete("r/none")
        assert storage.list("") == ["r/10/b"]
        storage.put("r/1/z", b"again")
        assert storage.read("r/1/z") == b"again"

    def test_the_root_is_never_deleted(self, storage: Storage) -> None:
        storage.put("a", b"")
        with pytest.raises(StorageError):
            storage.delete("")
        assert storage.exists("a")


class TestConditions:
    @pytest.mark.on_rgw
    def test_put_if_absent(self, storage: Storage) -> None:
        storage.put_if_absent("a", b"1")
        with pytest.raises(AlreadyExists, match="/a already exists"):
            storage.put_if_absent("a", b"2")
        assert storage.read("a") == b"1"

    def test_of_eight_writers_that_put_if_absent_one_wins(self, storage: Storage) -> None:
        for turn in range(5):
            key = f"race/{turn}"
            outcome = at_once([partial(storage.put_if_absent, key, b"%d" % number) for number in range(8)])
            winners = [number for number, result in enumerate(outcome) if result is None]
            assert len(winners) == 1, outcome
            assert all(isinstance(result, AlreadyExists) for result in outcome if result is not None)
            assert storage.read(key) == b"%d" % winners[0]

    def test_one_wins_even_if_all_write_the_same(self, storage: Storage) -> None:
        outcome = at_once([lambda: storage.put_if_absent("lock", b"same")] * 8)
        assert outcome.count(None) == 1

    @pytest.mark.on_rgw
    def test_compare_and_swap(self, storage: Storage) -> None:
        first = storage.compare_and_swap("head", b"1", None)
        assert storage.read_versioned("head") == (b"1", first)
        with pytest.raises(Conflict):
            storage.compare_and_swap("head", b"x", None)
        second = storage.compare_and_swap("head", b"2", first)
        with pytest.raises(Conflict):
            storage.compare_and_swap("head", b"x", first)
        assert storage.read_versioned("head") == (b"2", second)
        storage.delete("head")
        with pytest.raises(Conflict):
            storage.compare_and_swap("head", b"x", second)
        assert not storage.exists("head")

    @pytest.mark.on_rgw
    def test_concurrent_swaps_lose_no_update(self, storage: Storage) -> None:
        storage.put("counter", b"0")

        def count() -> None:
            for _ in range(25):
                while True:
                    value, token = storage.read_versioned("counter")
                    try:
                        storage.compare_and_swap("counter", b"%d" % (int(value) + 1), token)
                        break
                    except Conflict:
                        continue

        assert at_once([count] * 4) == [None] * 4
        assert storage.read("counter") == b"100"


class TestFiles:
    def test_large_file_there_and_back(self, storage: Storage, tmp_path: Path) -> None:
        data = os.urandom(12_345_678)
        (tmp_path / "large").write_bytes(data)
        storage.upload(tmp_path / "large", "models/large.bin")
        storage.download("models/large.bin", tmp_path / "new/folder/copy", hashlib.sha256(data).hexdigest())
        assert (tmp_path / "new/folder/copy").read_bytes() == data
        assert sha256_of(tmp_path / "large") == hashlib.sha256(storage.read("models/large.bin")).hexdigest()
        assert storage.list("") == ["models/large.bin"]

    def test_small_file_replaces(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("a", b"old")
        (tmp_path / "new").write_bytes(b"new")
        storage.upload(tmp_path / "new", "a")
        assert storage.read("a") == b"new"

    def test_no_such_local_file(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="none does not exist"):
            storage.upload(tmp_path / "none", "a")
        assert not storage.exists("a")

    def test_damaged_object(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("a", b"damaged")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/copy").write_bytes(b"old")
        with pytest.raises(CorruptObject, match="/a is damaged"):
            storage.download("a", tmp_path / "out/copy", hashlib.sha256(b"intact").hexdigest())
        assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("copy", b"old")]


class TestLocalOnly:
    def writers(self, root: Path, body: str, count: int) -> list[str]:
        script = f"import sys\nfrom tercet.storage import *\nfrom tercet.errors import *\nn = int(sys.argv[1])\n{body}"
        head = [sys.executable, "-c", script.replace("ROOT", repr(str(root)))]
        processes = [subprocess.Popen([*head, str(n)], stdout=subprocess.PIPE, text=True) for n in range(count)]
        return [process.communicate(timeout=400)[0].strip() for process in processes]

    def test_of_several_processes_one_wins(self, tmp_path: Path) -> None:
        body = """
s, won = open_storage(ROOT), 0
for turn in range(100):
    try:
        s.put_if_absent(f"race/{turn}", b"%d" % n)
        won += 1
    except AlreadyExists:
        pass
print(won)"""
        wins = [int(line) for line in self.writers(tmp_path, body, 4)]
        assert sum(wins) == 100

    def test_swaps_of_several_processes_lose_no_update(self, tmp_path: Path) -> None:
        body = """
s = open_storage(ROOT)
for _ in range(25):
    while True:
        value, token = s.read_versioned("counter")
        try:
            s.compare_and_swap("counter", b"%d" % (int(value) + 1), token)
            break
        except Conflict:
            pass"""
        LocalStorage(tmp_path).put("counter", b"0")
        self.writers(tmp_path, body, 4)
        assert LocalStorage(tmp_path).read("counter") == b"100"

    def test_sigkill_during_a_put_leaves_the_old_value(self, tmp_path: Path) -> None:
        old, new = b"o" * 4_000_000, b"n" * 4_000_000
        storage = LocalStorage(tmp_path / "storage")
        script = f"""
from pathlib import Path
from tercet.storage.local import LocalStorage
s = LocalStorage(Path({str(tmp_path / "storage")!r}))
print(flush=True)
while True:
    s.put("a", b"n" * 4_000_000)
    s.put("a", b"o" * 4_000_000)"""
        for turn in range(8):
            storage.put("a", old)
            with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
                assert writer.stdout
                writer.stdout.readline()
                time.sleep(0.003 * turn)
                writer.kill()
            assert storage.read("a") in (old, new)
            assert storage.list("") == ["a"]
        storage.put("a", b"the lock is free")

    def test_staged_files_are_not_listed_and_old_ones_are_deleted(self, tmp_path: Path) -> None:
        storage = LocalStorage(tmp_path)
        storage.put("a", b"")
        (tmp_path / ".tercet/staged-fresh").write_bytes(b"someone else's")
        (tmp_path / ".tercet/staged-old").write_bytes(b"of a killed process")
        os.utime(tmp_path / ".tercet/staged-old", (0, 0))
        storage.put("b", b"")
        assert storage.list("") == ["a", "b"]
        assert {path.name for path in (tmp_path / ".tercet").iterdir()} == {"lock", "staged-fresh"}
        with pytest.raises(StorageError, match="reserved"):
            storage.put(".tercet/lock", b"")

    def test_the_wait_for_a_held_lock_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tercet.storage.local.LOCK_TIMEOUT_SECONDS", 0.2)
        storage = LocalStorage(tmp_path)
        storage.put("a", b"1")
        with storage._lock():
            (outcome,) = at_once([lambda: storage.put("a", b"2")])
        assert isinstance(outcome, StorageUnavailable)
        assert "another process has held" in outcome.message
        assert storage.read("a") == b"1"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3)
    yield proxy
    proxy.close()


@pytest.fixture
def behind(s3: S3Server, proxy: FaultyProxy) -> Storage:
    """A storage behind the faulty proxy."""
    return open_storage(f"{s3.new_bucket()}/p", proxy.endpoint_url)


class TestFaults:
    @pytest.mark.on_rgw
    def test_a_lost_reply_of_put_if_absent_is_a_success(self, behind: Storage, proxy: FaultyProxy) -> None:
        proxy.fail("PUT", "lose_reply")
        behind.put_if_absent("a", b"1")
        assert behind.read("a") == b"1"
        assert sum(request.startswith("PUT") for request in proxy.requests) == 2
        with pytest.raises(AlreadyExists):
            behind.put_if_absent("a", b"1")

    @pytest.mark.on_rgw
    def test_a_lost_reply_of_a_swap_is_a_success(self, behind: Storage, proxy: FaultyProxy) -> None:
        token = behind.compare_and_swap("a", b"1", None)
        proxy.fail("PUT", "lose_reply")
        assert behind.compare_and_swap("a", b"2", token) == behind.read_versioned("a")[1]

    def test_a_swap_that_never_arrived_and_lost_the_race_is_a_conflict(
        self, behind: Storage, proxy: FaultyProxy
    ) -> None:
        token = behind.compare_and_swap("a", b"1", None)
        open_storage(behind.uri).put("a", b"other")
        proxy.fail("PUT", "refuse")
        with pytest.raises(Conflict):
            behind.compare_and_swap("a", b"2", token)

    @pytest.mark.on_rgw
    def test_a_lost_reply_to_the_end_of_a_large_upload(
        self, behind: Storage, proxy: FaultyProxy, tmp_path: Path
    ) -> None:
        (tmp_path / "large").write_bytes(os.urandom(10_000_000))
        proxy.fail("PUT", "refuse", times=2)
        behind.upload(tmp_path / "large", "a")
        proxy.fail("POST", "refuse")
        behind.upload(tmp_path / "large", "b")
        for key in "ab":
            behind.download(key, tmp_path / key, sha256_of(tmp_path / "large"))
        parts = [request for request in proxy.requests if "partNumber" in request]
        assert len(parts) == 6

        proxy.fail("POST", "pass")  # the first POST makes the upload
        proxy.fail("POST", "lose_reply")  # the second completes it
        proxy.fail("POST", "forgotten")  # as some servers say at the second time; moto and RGW say yes again
        behind.upload(tmp_path / "large", "c")
        behind.download("c", tmp_path / "c", sha256_of(tmp_path / "large"))
        proxy.fail("POST", "pass")
        proxy.fail("POST", "forgotten")
        with pytest.raises(ObjectNotFound):
            behind.upload(tmp_path / "large", "never")
        assert not behind.exists("never")

    @pytest.mark.parametrize("fault", ["refuse", "lose_reply", "flip", "cut", "stall"])
    def test_one_fault_in_a_read_is_repaired(
        self, behind: Storage, proxy: FaultyProxy, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if fault == "stall":
            monkeypatch.setattr(tercet.storage.s3, "READ_TIMEOUT_SECONDS", 2)
        data = os.urandom(100_000)
        behind.put("a", data)
        proxy.fail("GET", fault)
        assert behind.read("a") == data
        proxy.fail("GET", fault)
        behind.download("a", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        assert proxy.faults == []

    def test_bytes_that_stay_damaged(self, behind: Storage, proxy: FaultyProxy, tmp_path: Path) -> None:
        behind.put("a", b"0123456789")
        proxy.fail("GET", "flip", times=100)
        with pytest.raises(CorruptObject) as caught:
            behind.read("a")
        with pytest.raises(CorruptObject):
            behind.download("a", tmp_path / "out/copy")
        assert list((tmp_path / "out").iterdir()) == []
        behind.compare_and_swap("a", b"mended", caught.value.token)
        with pytest.raises(Conflict):
            behind.compare_and_swap("a", b"too late", caught.value.token)

    @pytest.mark.parametrize("fault", ["refuse", "stall", "lose_reply"])
    def test_a_long_silence_raises(
        self, behind: Storage, proxy: FaultyProxy, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        behind.put("a", b"1")
        monkeypatch.setattr(tercet.storage.s3, "PATIENCE_SECONDS", 6.0)
        if fault == "stall":
            monkeypatch.setattr(tercet.storage.s3, "READ_TIMEOUT_SECONDS", 2)
        proxy.fail("GET", fault, times=100)
        start = time.monotonic()
        with pytest.raises(StorageUnavailable, match=proxy.endpoint_url) as caught:
            behind.read("a")
        seconds, num_requests = time.monotonic() - start, sum(request.startswith("GET") for request in proxy.requests)
        # Pauses are drawn, so the last one may be given up early; what never answers is waited for to the end.
        assert num_requests > 1 or (fault == "stall" and seconds > 5.9)
        assert seconds < 100
        assert "AWS_ENDPOINT_URL" in caught.value.hint


class TestMistakes:
    """Mistakes of a user, and the errors that name them."""

    @pytest.mark.usefixtures("s3")
    def test_no_server_listens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tercet.storage.s3, "FIRST_CONTACT_SECONDS", 2.0)
        start = time.monotonic()
        with silent_address() as address:
            endpoint = f"http://{address}"
            with pytest.raises(StorageUnavailable, match=endpoint):
                open_storage("s3://some-bucket", endpoint).exists("a")
        assert time.monotonic() - start < 60

    @pytest.mark.usefixtures("s3")
    def test_missing_bucket(self, tmp_path: Path) -> None:
        storage = open_storage("s3://there-is-none/p")
        calls: list[Callable[[], object]] = [
            lambda: storage.read("a"),
            lambda: storage.exists("a"),
            lambda: storage.list(""),
            lambda: storage.put("a", b""),
            lambda: storage.put_if_absent("a", b""),
            lambda: storage.compare_and_swap("a", b"", "0" * 32),
            lambda: storage.download("a", tmp_path / "a"),
            lambda: storage.delete("a"),
        ]
        for call in calls:
            with pytest.raises(BucketNotFound, match="there-is-none"):
                call()

    @pytest.mark.on_rgw
    @pytest.mark.parametrize("s3", ["rgw"], indirect=True)  # moto accepts any
    @pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_credentials(self, s3: S3Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        uri = s3.new_bucket()
        monkeypatch.setenv(name, "wrong")
        storage = open_storage(uri)
        for call in (storage.read, storage.exists, storage.list, storage.delete):
            with pytest.raises(AccessDenied) as caught:
                call("a")
            assert "AWS_ACCESS_KEY_ID" in caught.value.hint
        with pytest.raises(AccessDenied):
            storage.put_if_absent("a", b"")

    def test_no_credentials(self, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        uri = s3.new_bucket()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        with pytest.raises(AccessDenied):
            open_storage(uri).read("a")

    @pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "", "http://host/x"])
    def test_unknown_uri(self, uri: str) -> None:
        with pytest.raises(ConfigError):
            open_storage(uri)

    def test_endpoint_without_scheme(self) -> None:
        with pytest.raises(ConfigError, match="not a URL"):
            open_storage("s3://bucket", "localhost:9000")


def test_importing_storage_is_cheap() -> None:
    code = (
        "import sys, tercet.storage; print([m for m in ('s3fs', 'botocore', 'pyarrow', 'fsspec') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
