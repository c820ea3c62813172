"""One of two attempts at a run trains. A dead holder is replaced; a live one that was replaced notices it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.waiting import wait_until
from tercet.artifacts import lease as module
from tercet.artifacts.lease import Attempt, Holder, Lease, is_fenced, read_attempts
from tercet.errors import CorruptObject, LeaseLost, RunIsTaken, StorageUnavailable
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal, unseal
from tercet.storage.layout import lease_key
from tercet.storage.local import LocalStorage

SECONDS = 2.0


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    """Skip fsync: a busy disk may take longer than these leases last."""
    monkeypatch.setattr("tercet.storage.local._sync", lambda _: None)
    return LocalStorage(tmp_path / "storage")


def holder(storage: Storage) -> Holder:
    return unseal(Holder, storage.read(lease_key("r")), "LEASE.json")


def of_elsewhere(storage: Storage, **changes: object) -> None:
    """Give the lease to a process of another machine."""
    values = {"generation": 3, "owner": "one", "place": "elsewhere -", "pid": 1, "since_unix_seconds": 0.0, **changes}
    storage.put(lease_key("r"), seal(Holder(run_id="r", **values)))  # type: ignore[arg-type]


def test_a_run_that_nobody_holds(storage: LocalStorage) -> None:
    assert read_attempts(storage, "r") == ()
    lease = Lease(storage, "r", "one", 60)
    attempt = lease.begin("a", 0, 2)
    assert attempt == Attempt(name="a", generation=1, first_step=0, world_size=2)
    assert read_attempts(storage, "r") == (attempt,)
    assert (holder(storage).pid, holder(storage).released) == (os.getpid(), False)
    lease.release()
    assert holder(storage).released


def test_a_released_lease_is_taken_at_once(storage: LocalStorage) -> None:
    for generation, owner in enumerate(("one", "two", "three"), start=1):
        started = time.monotonic()
        lease = Lease(storage, "r", owner, 600)
        assert lease.begin(owner, 10 * generation, 1).generation == generation
        lease.release()
        assert time.monotonic() - started < 300
    assert [attempt.first_step for attempt in read_attempts(storage, "r")] == [10, 20, 30]


def test_a_live_holder_is_named(storage: LocalStorage) -> None:
    lease = Lease(storage, "r", "one", SECONDS)
    started = time.monotonic()
    with pytest.raises(RunIsTaken, match=f"run r is being trained: process {os.getpid()} on .* since 20.* UTC"):
        Lease(storage, "r", "two", SECONDS)
    assert 2 * SECONDS < time.monotonic() - started < 30 * SECONDS
    lease.check()
    lease.release()


def test_a_holder_that_dies_while_another_waits_is_replaced(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like the workers of a driver that was killed."""
    of_elsewhere(storage)
    read, num_reads, started = storage.read_versioned, 0, time.monotonic()

    def reads(key: str) -> tuple[bytes, str]:
        nonlocal num_reads
        num_reads += 1
        if num_reads == 5:
            of_elsewhere(storage, num_renewals=1)
        return read(key)

    monkeypatch.setattr(storage, "read_versioned", reads)
    Lease(storage, "r", "two", SECONDS).release()
    assert time.monotonic() - started > SECONDS
    assert holder(storage).generation == 4


def test_an_expired_lease_is_taken_over(storage: LocalStorage) -> None:
    of_elsewhere(storage)
    started = time.monotonic()
    lease = Lease(storage, "r", "two", SECONDS)
    assert time.monotonic() - started > SECONDS
    assert holder(storage).generation == 4
    lease.release()


def test_an_attempt_of_the_same_owner_is_taken_over_at_once(storage: LocalStorage) -> None:
    of_elsewhere(storage)
    Lease(storage, "r", "one", 600).release()
    assert holder(storage).generation == 4


def test_a_process_of_this_machine_that_has_ended(storage: LocalStorage) -> None:
    """The same command started again after a crash does not wait."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    of_elsewhere(storage, place=module._place(), pid=ended.pid)
    Lease(storage, "r", "two", 600).release()
    of_elsewhere(storage, place=module._place(), pid=os.getpid())
    assert not holder(storage).is_gone()


def test_a_replaced_holder_finds_out(storage: LocalStorage) -> None:
    lease = Lease(storage, "r", "one", SECONDS)
    lease.check()
    of_elsewhere(storage, owner="two", pid=77)
    wait_until(lambda: lease._lost is not None)
    with pytest.raises(LeaseLost, match="run r was taken over by process 77 on elsewhere"):
        lease.check()
    lease.release()
    assert holder(storage).owner == "two"  # which it leaves alone
    assert not holder(storage).released


def test_a_suspended_holder_asks(storage: LocalStorage) -> None:
    """No renewal was due since another attempt took the run."""
    lease = Lease(storage, "r", "one", 600)
    lease.confirm()
    assert holder(storage).num_renewals > 0
    of_elsewhere(storage, owner="two", pid=77)
    lease.check()
    with pytest.raises(LeaseLost, match="taken over by process 77"):
        lease.confirm()
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()


def test_a_holder_replaced_before_it_began(storage: LocalStorage) -> None:
    lease = Lease(storage, "r", "one", 600)
    of_elsewhere(storage, owner="two")
    with pytest.raises(LeaseLost):
        lease.begin("a", 0, 1)
    assert read_attempts(storage, "r") == ()
    lease.release()


def test_a_failed_renewal_does_not_lose_the_lease(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(storage, "r", "one", SECONDS)
    failed = 0

    def fails(*_: object) -> str:
        nonlocal failed
        failed += 1
        raise StorageUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", fails)
        wait_until(lambda: failed >= 2)
    renewals = holder(storage).num_renewals
    wait_until(lambda: holder(storage).num_renewals > renewals)
    lease.check()
    lease.release()


def test_a_lost_reply_does_not_lose_the_lease(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap succeeded, but its caller got a Conflict."""
    lease = Lease(storage, "r", "one", 600)
    swap = storage.compare_and_swap

    def loses_its_answer(key: str, data: bytes, token: str | None) -> str:
        swap(key, data, token)
        return swap(key, data, token)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", loses_its_answer)
        attempt = lease.begin("a", 5, 1)
    assert read_attempts(storage, "r") == (attempt,)
    lease.release()
    assert holder(storage).released


def test_a_document_that_cannot_be_read(storage: LocalStorage) -> None:
    storage.put(lease_key("r"), b"{")
    with pytest.raises(CorruptObject, match=r"LEASE\.json is damaged") as caught:
        Lease(storage, "r", "one", SECONDS)
    assert "says which process trains this run" in caught.value.hint


def test_the_lease_of_another_run(storage: LocalStorage) -> None:
    Lease(storage, "other", "one", SECONDS).release()
    storage.put(lease_key("r"), storage.read(lease_key("other")))
    with pytest.raises(CorruptObject, match="is the lease of run other"):
        read_attempts(storage, "r")


def test_one_of_many_concurrent_attempts_gets_the_lease(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tercet.errors import RunIsTaken\n"
        "from tercet.artifacts.lease import Lease\n"
        "from tercet.storage import local, open_storage\n"
        "local._sync = lambda _: None\n"
        "try:\n"
        "    lease = Lease(open_storage(sys.argv[1]), 'r', sys.argv[2], 5)\n"
        "except RunIsTaken:\n"
        "    print('taken')\n"
        "else:\n"
        "    lease.begin(sys.argv[2], 0, 1)\n"
        "    sys.stdin.read()\n"  # until all others have ended
        "    lease.check()\n"
        "    lease.release()\n"
        "    print('trained')\n"
    )
    commands = [[sys.executable, "-c", script, str(tmp_path), owner] for owner in ("one", "two", "three", "four")]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for command in commands]
    wait_until(lambda: sum(process.poll() is None for process in processes) <= 1, 120)
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["taken", "taken", "taken", "trained"]
    assert len(read_attempts(open_storage(str(tmp_path)), "r")) == 1


def attempt(generation: int, first_step: int) -> Attempt:
    return Attempt(name=str(generation), generation=generation, first_step=first_step, world_size=1)


@pytest.mark.parametrize(
    ("generation", "step", "fenced"),
    [(1, 10, False), (1, 20, False), (1, 30, True), (2, 30, False), (2, 50, True), (3, 50, False), (1, 41, True)],
)
def test_an_older_attempt_counts_up_to_where_a_later_one_resumed(generation: int, step: int, fenced: bool) -> None:
    attempts = [attempt(1, 0), attempt(2, 20), attempt(3, 40)]
    assert is_fenced(attempts[generation - 1], step, attempts) == fenced


def test_an_attempt_that_did_not_finish_is_known_to_the_next(storage: LocalStorage) -> None:
    first = Lease(storage, "r", "one", 60)
    assert first.unfinished_before is None
    attempt = first.begin("a", 0, 2)
    second = Lease(storage, "r", "one", 60)  # the first was never released
    assert second.unfinished_before == attempt
    third = Lease(storage, "r", "one", 60)  # the second had not begun
    assert third.unfinished_before is None
    attempt = third.begin("c", 0, 2)
    third.release(finished=False)
    fourth = Lease(storage, "r", "two", 60)
    assert fourth.unfinished_before == attempt
    fourth.begin("d", 0, 2)
    fourth.release()
    fifth = Lease(storage, "r", "one", 60)
    assert fifth.unfinished_before is None
    for lease in (first, second, fifth):
        lease.release()
