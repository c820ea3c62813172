"""Versions and promotions; serving gets a whole, verified model or an error."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.published import decision, finished_run
from tercet.artifacts.champion import Champion, history, read_champion
from tercet.artifacts.decision import GateDecision
from tercet.artifacts.registry import (
    Version,
    download,
    list_models,
    list_versions,
    promote,
    read_decision,
    read_version,
    register,
    resolve,
    serve,
)
from tercet.errors import ChampionMoved, CorruptObject, ObjectNotFound, StorageUnavailable
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal, sha256
from tercet.storage.layout import best_prefix, champion_key
from tercet.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def publish(storage: Storage, run_id: str) -> Version:
    return register(storage, "m", finished_run(storage, run_id), "me")


def serving(storage: Storage, run_id: str) -> Version:
    version = publish(storage, run_id)
    serve(storage, version, read_champion(storage, "m"), "by hand", "a try", "me")
    return version


def test_versions_are_numbered(storage: LocalStorage) -> None:
    first, second = publish(storage, "r1"), publish(storage, "r2")
    assert (first.number, second.number) == (1, 2)
    assert list_versions(storage, "m") == [1, 2]
    assert read_version(storage, "m", 2) == second
    assert second.commit.folder == "runs/r2/best"
    assert second.lineage.dataset_versions == {"poems": "0123456789abcdef"}
    assert list_models(storage) == ["m"]
    assert list_versions(storage, "other") == []
    storage.put("models/m/versions/.DS_Store", b"of a file manager")
    assert list_versions(storage, "m") == [1, 2]


def test_a_run_is_published_once(storage: LocalStorage) -> None:
    first = publish(storage, "r1")
    publish(storage, "r2")
    assert publish(storage, "r1") == first
    assert list_versions(storage, "m") == [1, 2]
    again = register(storage, "m", finished_run(storage, "r1", b"trained further"), "me")
    assert (again.number, again.commit.folder) == (3, first.commit.folder)


def test_a_number_that_another_took(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    put = storage.put_if_absent

    def late(key: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "put_if_absent", put)
        publish(storage, "r2")
        put(key, data)

    monkeypatch.setattr(storage, "put_if_absent", late)
    assert publish(storage, "r1").number == 2
    assert read_version(storage, "m", 1).lineage.run_id == "r2"


def test_a_lost_reply(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    put = storage.put_if_absent

    def twice(key: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "put_if_absent", put)
        put(key, data)
        put(key, data)

    monkeypatch.setattr(storage, "put_if_absent", twice)
    assert publish(storage, "r1").number == 1
    assert list_versions(storage, "m") == [1]


def test_a_run_without_a_best_model(storage: LocalStorage) -> None:
    lineage = finished_run(storage, "r1")
    storage.delete("runs/r1/best/COMMIT")
    with pytest.raises(ObjectNotFound, match="run r1 has no best model"):
        register(storage, "m", lineage, "me")
    assert list_versions(storage, "m") == []


def test_what_does_not_exist(storage: LocalStorage) -> None:
    publish(storage, "r1")
    with pytest.raises(ObjectNotFound, match="has no version 7") as caught:
        read_version(storage, "m", 7)
    assert caught.value.hint == "versions there: 1"
    for name in ("m", "other"):
        with pytest.raises(ObjectNotFound, match=f"model {name} has no champion") as caught:
            resolve(storage, name)
        assert caught.value.hint == "models there: m"


def test_a_better_candidate_takes_the_place(storage: LocalStorage) -> None:
    first = serving(storage, "r1")
    compared: list[Champion | None] = []

    def decide(champion: Champion | None) -> GateDecision:
        compared.append(champion)
        return decision(sentence="Promote: much better.")

    before = read_champion(storage, "m")
    promotion = promote(storage, "m", finished_run(storage, "r2"), decide, "night")
    assert compared == [before]
    champion, version = resolve(storage, "m")
    assert promotion == (champion, decision(sentence="Promote: much better."))
    assert (champion.generation, champion.version, champion.kind) == (2, 2, "gated")
    assert (champion.reason, champion.who) == ("Promote: much better.", "night")
    assert champion.decision is not None
    assert read_decision(storage, champion.decision) == promotion.decision
    assert version.decision == champion.decision
    assert read_version(storage, "m", 1) == first


@pytest.mark.parametrize("verdict", ["keep", "undecided", "refused"])
def test_any_other_verdict_changes_nothing_but_is_kept(storage: LocalStorage, verdict: str) -> None:
    serving(storage, "r1")
    present = read_champion(storage, "m")
    found = decision(verdict)  # type: ignore[arg-type]
    assert promote(storage, "m", finished_run(storage, "r2"), lambda _: found, "night") == (present, found)
    assert read_champion(storage, "m") == present
    assert list_versions(storage, "m") == [1]
    kept = storage.list("models/m/decisions")
    assert [read_decision(storage, key) for key in kept] == [found]


def test_the_first_champion(storage: LocalStorage) -> None:
    promotion = promote(storage, "m", finished_run(storage, "r1"), lambda champion: decision(), "night")  # noqa: ARG005
    assert promotion.champion is not None
    assert (promotion.champion.generation, promotion.champion.parent_sha256) == (1, None)


def test_the_loser_is_gated_against_the_new_champion(storage: LocalStorage) -> None:
    """While r2 is compared with r1, r3 becomes the champion. r2 is better than r1, and no better than r3."""
    serving(storage, "r1")
    compared: list[int] = []

    def decide(champion: Champion | None) -> GateDecision:
        assert champion is not None
        compared.append(champion.version)
        if champion.version == 1:
            serving(storage, "r3")
            return decision("promote")
        return decision("keep")

    promotion = promote(storage, "m", finished_run(storage, "r2"), decide, "night")
    assert compared == [1, 2]
    assert promotion == (read_champion(storage, "m"), decision("keep"))
    assert [(found.version, found.kind) for found in history(storage, "m")] == [(2, "by hand"), (1, "by hand")]
    assert read_version(storage, "m", 3).lineage.run_id == "r2"  # published for the first decision, never the champion


def test_a_champion_that_keeps_moving(storage: LocalStorage) -> None:
    runs = iter(range(100))

    def decide(_: Champion | None) -> GateDecision:
        serving(storage, f"other-{next(runs)}")
        return decision()

    with pytest.raises(ChampionMoved, match="moved 10 times"):
        promote(storage, "m", finished_run(storage, "r"), decide, "night")


def test_a_promotion_whose_reply_never_came_resumes(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The swap succeeded, and the night was killed or gave up. The same command again finds the work done."""
    lineage = finished_run(storage, "r1")
    swap = storage.compare_and_swap

    def silent(key: str, data: bytes, token: str | None) -> str:
        new_token = swap(key, data, token)
        if key == champion_key("m"):
            raise StorageUnavailable("no answer")
        return new_token

    with monkeypatch.context() as patch:
        patch.setattr(storage, "compare_and_swap", silent)
        with pytest.raises(StorageUnavailable):
            promote(storage, "m", lineage, lambda _: decision(), "night")
    again = promote(storage, "m", lineage, lambda _: pytest.fail("it serves already"), "night")
    assert again == (read_champion(storage, "m"), None)
    assert len(history(storage, "m")) == 1


def test_a_rolled_back_version_is_not_promoted_again_by_the_same_night(storage: LocalStorage) -> None:
    first = serving(storage, "r1")
    lineage = finished_run(storage, "r2")
    promotion = promote(storage, "m", lineage, lambda _: decision(), "night")
    back = serve(storage, first, promotion.champion, "rollback", "answers in French", "me")
    again = promote(storage, "m", lineage, lambda _: pytest.fail("it was the champion"), "night")
    assert again == (back, None)
    assert read_champion(storage, "m") == back


def test_serving_gets_every_file_verified(storage: LocalStorage, tmp_path: Path) -> None:
    version = serving(storage, "r1")
    folder = download(storage, resolve(storage, "m")[1], tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"r1" * 500
    assert (folder / "1_Pooling/config.json").read_text() == '{"of": "r1"}'
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *version.commit.files
    }
    storage.delete(best_prefix("r1"))  # it is here, and whole: storage is not asked
    assert download(storage, version, tmp_path / "cache") == folder
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ObjectNotFound):
        download(storage, version, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_model_that_is_not_whole_never_appears(storage: LocalStorage, tmp_path: Path, damage: str) -> None:
    version = serving(storage, "r1")
    key = "runs/r1/best/model.safetensors"
    storage.delete(key) if damage == "missing" else storage.put(key, b"r1" * 499 + b"r2")
    with pytest.raises((CorruptObject, ObjectNotFound)):
        download(storage, version, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_files_left_by_a_killed_reader_are_no_model(storage: LocalStorage, tmp_path: Path) -> None:
    version = serving(storage, "r1")
    left = tmp_path / "cache" / f".m-1-{version.nonce[:8]}.coming"
    left.mkdir(parents=True)
    (left / "stranger").write_text("of before")
    folder = download(storage, version, tmp_path / "cache")
    assert not (folder / "stranger").exists()
    assert not left.exists()


def test_a_version_that_was_changed_is_not_served(storage: LocalStorage) -> None:
    version = serving(storage, "r1")
    storage.put("models/m/versions/00000001.json", seal(version.model_copy(update={"who": "another"})))
    with pytest.raises(CorruptObject, match="is not the version that was promoted"):
        resolve(storage, "m")


def test_a_version_that_another_tercet_wrote_in_its_own_way_is_served(storage: LocalStorage) -> None:
    """The hash is that of the stored bytes, not of what this tercet would write."""
    version = publish(storage, "r1")
    storage.put("models/m/versions/00000001.json", version.model_dump_json(indent=7).encode())
    champion = serve(storage, version, None, "by hand", "a try", "me")
    assert champion.version_sha256 == sha256(storage.read("models/m/versions/00000001.json"))
    assert resolve(storage, "m") == (champion, version)


def test_threads_that_publish_at_once_get_numbers_of_their_own(storage: LocalStorage) -> None:
    lineages = [finished_run(storage, f"r{number}") for number in range(8)]
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda lineage=lineage: numbers.append(register(storage, "m", lineage, "me").number))
        for lineage in lineages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert sorted(read_version(storage, "m", n).lineage.run_id for n in numbers) == [f"r{n}" for n in range(8)]


def test_processes_that_download_at_once_get_one_whole_folder(storage: LocalStorage, tmp_path: Path) -> None:
    serving(storage, "r1")
    script = (
        "import sys\nfrom pathlib import Path\nfrom tercet.artifacts.registry import download, resolve\n"
        "from tercet.storage import open_storage\nstorage = open_storage(sys.argv[1])\n"
        "print(download(storage, resolve(storage, 'm')[1], Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", script, storage.uri, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").read_bytes() == b"r1" * 500


def test_a_decision_that_cannot_be_read(storage: LocalStorage) -> None:
    storage.put("models/m/decisions/x.json", b"{")
    with pytest.raises(CorruptObject, match="cannot be read"):
        read_decision(open_storage(storage.uri), "models/m/decisions/x.json")
