"""The pointer: one writer wins, nothing is lost and the chain holds, whenever a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tercet.artifacts.champion import Champion, history, move_champion, read_champion
from tercet.errors import ChampionMoved, ConfigError, CorruptObject, StorageUnavailable
from tercet.failpoints import VARIABLE
from tercet.storage import Storage
from tercet.storage.documents import seal, sha256
from tercet.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def move(storage: Storage, expected: Champion | None, version: int, **changed: Any) -> Champion:
    values = {"version_sha256": "ab", "kind": "gated", "reason": "better", "who": "me", **changed}
    return move_champion(storage, expected, name="m", version=version, **values)


def three(storage: Storage) -> list[Champion]:
    chain: list[Champion] = []
    for version in (1, 2, 3):
        chain.append(move(storage, chain[-1] if chain else None, version))
    return chain


def generation(number: int) -> str:
    return f"models/m/champions/{number:08d}.json"


def test_no_champion_yet(storage: LocalStorage) -> None:
    assert read_champion(storage, "m") is None
    assert history(storage, "m") == []


def test_each_generation_names_the_one_before(storage: LocalStorage) -> None:
    chain = three(storage)
    assert read_champion(storage, "m") == chain[2]
    assert history(storage, "m") == chain[::-1]
    assert [found.generation for found in chain] == [1, 2, 3]
    assert [found.parent_sha256 for found in chain] == [None, sha256(seal(chain[0])), sha256(seal(chain[1]))]
    for found in chain:
        assert storage.read(generation(found.generation)) == seal(found)


def test_a_rollback_is_a_generation(storage: LocalStorage) -> None:
    chain = three(storage)
    back = move(storage, chain[2], 1, kind="rollback", reason="answers in French")
    assert (back.generation, back.version, back.kind, back.reason) == (4, 1, "rollback", "answers in French")
    assert history(storage, "m") == [back, *chain[::-1]]


@pytest.mark.parametrize("expects", [0, 1, None])
def test_who_expects_another_champion_changes_nothing(storage: LocalStorage, expects: int | None) -> None:
    chain = three(storage)
    before = {key: storage.read(key) for key in storage.list("")}
    with pytest.raises(ChampionMoved, match="has changed: it is version 3, generation 3"):
        move(storage, None if expects is None else chain[expects], 9)
    assert {key: storage.read(key) for key in storage.list("")} == before


def test_who_expects_a_champion_where_there_is_none(storage: LocalStorage, tmp_path: Path) -> None:
    first = move(LocalStorage(tmp_path / "other"), None, 1)
    with pytest.raises(ChampionMoved, match="there is none"):
        move(storage, first, 2)
    assert storage.list("") == []


def meanwhile(storage: Storage, monkeypatch: pytest.MonkeyPatch, event: Callable[[Callable[..., str]], object]) -> None:
    """`event` comes between the decision to swap and the swap; it gets the swap itself."""
    swap = storage.compare_and_swap

    def late(key: str, data: bytes, token: str | None) -> str:
        monkeypatch.setattr(storage, "compare_and_swap", swap)
        event(lambda: swap(key, data, token))
        return swap(key, data, token)

    monkeypatch.setattr(storage, "compare_and_swap", late)


def test_another_one_is_quicker(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    first = move(storage, None, 1)
    meanwhile(storage, monkeypatch, lambda _: move(storage, first, 2))
    with pytest.raises(ChampionMoved, match="version 2, generation 2"):
        move(storage, first, 3)
    assert [found.version for found in history(storage, "m")] == [2, 1]


def test_an_answer_that_got_lost(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap succeeded, but the caller gets a conflict."""
    meanwhile(storage, monkeypatch, lambda swap: swap())
    first = move(storage, None, 1)
    meanwhile(storage, monkeypatch, lambda swap: swap())
    second = move(storage, first, 2)
    assert history(storage, "m") == [second, first]


def test_an_answer_that_got_lost_and_another_one_since(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the conflict is reported, another publisher files this champion and replaces it."""
    first = move(storage, None, 1)

    def both(swap: Callable[..., str]) -> None:
        swap()
        move(storage, read_champion(storage, "m"), 3)

    meanwhile(storage, monkeypatch, both)
    second = move(storage, first, 2)
    assert [found.version for found in history(storage, "m")] == [3, 2, 1]
    assert history(storage, "m")[1] == second


def test_a_storage_that_does_not_answer_is_no_conflict(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> str:
        raise StorageUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", silent)
        with pytest.raises(StorageUnavailable):
            move(storage, None, 1)
    assert move(storage, None, 1).generation == 1


MOVE = """
import sys
from tercet.artifacts.champion import move_champion, read_champion
from tercet.storage import open_storage
storage = open_storage(sys.argv[1])
values = {"version_sha256": "ab", "kind": "gated", "reason": "better", "who": "me"}
move_champion(storage, read_champion(storage, "m"), name="m", version=int(sys.argv[2]), **values)
"""


@pytest.mark.parametrize(("place", "versions"), [("before_champion", [3, 1]), ("after_champion", [3, 2, 1])])
def test_a_kill_around_the_swap(storage: LocalStorage, tmp_path: Path, place: str, versions: list[int]) -> None:
    first = move(storage, None, 1)
    storage.delete(generation(1))  # as if the first one had been killed as well, before it was filed
    armed = {VARIABLE: f"at={place} step=2 once={tmp_path / 'fired'}"}
    done = subprocess.run([sys.executable, "-c", MOVE, storage.uri, "2"], env={**os.environ, **armed}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [found.version for found in history(storage, "m")] == versions[1:]
    assert not storage.exists(generation(2))  # the newest is only the champion
    move(storage, read_champion(storage, "m"), 3)
    assert [found.version for found in history(storage, "m")] == versions
    assert storage.read(generation(1)) == seal(first)


def test_a_chain_that_does_not_hold(storage: LocalStorage) -> None:
    chain = three(storage)
    forged = chain[1].model_copy(update={"version": 9})
    storage.put(generation(2), seal(forged))
    with pytest.raises(CorruptObject, match="is not the champion that generation 3 replaced"):
        history(storage, "m")
    storage.delete(generation(2))
    with pytest.raises(CorruptObject, match="is not the champion that generation 3 replaced"):
        history(storage, "m")
    storage.put(generation(2), seal(chain[1]))
    storage.put("models/m/champion.json", seal(chain[0].model_copy(update={"generation": 7})))
    with pytest.raises(CorruptObject, match="are not 1, 2, 3"):
        history(storage, "m")


def test_a_file_in_the_way_of_the_present_champion(storage: LocalStorage) -> None:
    chain = three(storage)
    storage.put(generation(3), seal(chain[0]))
    with pytest.raises(CorruptObject, match="differs from the champion"):
        move(storage, chain[2], 4)
    assert read_champion(storage, "m") == chain[2]


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"format": 2}'])
def test_a_pointer_that_cannot_be_read(storage: LocalStorage, data: bytes) -> None:
    storage.put("models/m/champion.json", data)
    for call in (lambda: read_champion(storage, "m"), lambda: history(storage, "m"), lambda: move(storage, None, 1)):
        with pytest.raises(CorruptObject, match="cannot be read"):
            call()
    assert storage.read("models/m/champion.json") == data


@pytest.mark.parametrize("name", ["", "a/b", "..", ".m", "m" * 65, "a b"])
def test_names_that_cannot_be(storage: LocalStorage, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a model"):
        read_champion(storage, name)


MOVE_TEN_TIMES = f"""
import sys
import tercet.artifacts.champion, tercet.storage
from tercet.errors import ChampionMoved
print(flush=True)
sys.stdin.read(1)
done = lost = 0
while done < 10:
    try:
        {MOVE.strip().replace(chr(10), chr(10) + "        ")}
        done += 1
    except ChampionMoved:
        lost += 1
print(lost)
"""


def test_of_many_processes_one_wins_each_place(storage: LocalStorage) -> None:
    """Each tries to add 10 generations to what it reads; who loses reads again."""
    commands = [[sys.executable, "-c", MOVE_TEN_TIMES, storage.uri, str(version)] for version in (1, 2, 3, 4)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for command in commands]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()  # it is ready
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")  # go
        process.stdin.flush()
    lost = [int(process.communicate(timeout=400)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    chain = history(storage, "m")
    assert len(chain) == 40
    assert sorted(found.version for found in chain) == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10
    assert sum(lost) > 0, "nobody ever lost: they did not race"
