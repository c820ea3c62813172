"""A checkpoint counts from its COMMIT on, and only as long as every byte is what was committed."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from support.checkpoints import FILES, MODEL_FILES, RUN, Recording, committed, lineage, trained
from tercet.artifacts import checkpoint
from tercet.artifacts.best import best_commit, best_whole, publish_best, read_best, retain
from tercet.artifacts.checkpoint import Commit, FileRecord, commit_step, fetch, fetch_newest, read_commits, upload_part
from tercet.artifacts.lease import Lease
from tercet.errors import CorruptObject, ObjectNotFound, StorageUnavailable
from tercet.storage.documents import seal
from tercet.storage.layout import COMMIT, attempt_folder, lease_key
from tercet.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "storage")


def flip_a_byte(storage: LocalStorage, key: str) -> None:
    path = Path(storage.uri, key)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_commit_is_written_last(storage: Recording, tmp_path: Path) -> None:
    commit = committed(storage, tmp_path, 10)
    assert storage.written[-2:] == [f"{commit.folder}/rank-0.json", f"runs/r1/checkpoints/00000010/{COMMIT}"]
    assert {key.removeprefix(f"{commit.folder}/") for key in storage.written[:-2]} == set(FILES)
    assert set(commit.files) == set(FILES)
    assert commit.files["optimizer-00000-of-00001.safetensors"].num_bytes == len(b"moments")
    assert read_commits(storage, RUN) == [commit]


def test_what_a_person_left_beside_checkpoints_is_let_be(storage: Recording, tmp_path: Path) -> None:
    strays = [f"runs/r1/checkpoints/{name}" for name in (".DS_Store", "7", "backup/x", "00000010 copy/a/x")]
    for key in strays:
        storage.put(key, b"stray")
    committed(storage, tmp_path, 10, 0.5)
    commit = committed(storage, tmp_path, 20, 0.6)
    assert fetch_newest(storage, RUN, tmp_path / "here") == commit
    retain(storage, RUN, "ndcg@10", 1)
    assert read_commits(storage, RUN) == [commit]
    assert all(storage.exists(key) for key in strays)


def test_without_a_commit_there_is_nothing(storage: Recording, tmp_path: Path) -> None:
    upload_part(storage, trained(tmp_path), attempt_folder(RUN, 10, "a"), rank=0)
    assert read_commits(storage, RUN) == []
    assert fetch_newest(storage, RUN, tmp_path / "here") is None


def test_every_rank_has_its_part_in_it(storage: Recording, tmp_path: Path) -> None:
    folder = attempt_folder(RUN, 10, "a")
    upload_part(storage, trained(tmp_path), folder, rank=0)
    upload_part(storage, trained(tmp_path, files={"rng_state_1.pth": b"other"}), folder, rank=1)
    commit = commit_step(storage, RUN, 10, 1.0, {}, lineage("a", 2), wait_seconds=1)
    assert set(commit.files) == {*FILES, "rng_state_1.pth"}


def test_a_part_that_does_not_come(storage: Recording, tmp_path: Path) -> None:
    upload_part(storage, trained(tmp_path), attempt_folder(RUN, 10, "a"), rank=0)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"rank-1\.json: did not appear in time"):
        commit_step(storage, RUN, 10, 1.0, {}, lineage("a", 2), wait_seconds=0.2)
    assert time.monotonic() - started < 60
    assert read_commits(storage, RUN) == []


def test_a_part_that_comes_late_is_waited_for(storage: Recording, tmp_path: Path) -> None:
    folder = attempt_folder(RUN, 10, "a")
    upload_part(storage, trained(tmp_path), folder, rank=0)
    late = threading.Timer(0.2, upload_part, (storage, trained(tmp_path, files={"x": b"x"}), folder, 1))
    late.start()
    assert "x" in commit_step(storage, RUN, 10, 1.0, {}, lineage("a", 2), wait_seconds=120).files
    late.join()


def test_the_part_of_another_rank_is_damage(storage: Recording, tmp_path: Path) -> None:
    """Or a checkpoint would be committed without the files of one rank."""
    folder = attempt_folder(RUN, 10, "a")
    for rank in (0, 1):
        upload_part(storage, trained(tmp_path, files={f"rng_state_{rank}.pth": b"x"}), folder, rank)
    storage.put(f"{folder}/rank-0.json", storage.read(f"{folder}/rank-1.json"))
    with pytest.raises(CorruptObject, match=r"rank-0\.json is the part of rank 1"):
        commit_step(storage, RUN, 10, 1.0, {}, lineage("a", 2), wait_seconds=1)
    assert read_commits(storage, RUN) == []


def test_of_two_attempts_at_one_step_the_first_stands(storage: Recording, tmp_path: Path) -> None:
    first = committed(storage, tmp_path, 10, 0.5, "a", b"first")
    second = committed(storage, tmp_path, 10, 0.6, "b", b"second")
    assert second == first == read_commits(storage, RUN)[0]
    fetch(storage, second, tmp_path / "here")
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"first"


def test_of_two_that_replace_a_damaged_commit_the_first_stands(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(storage, tmp_path, 10, 0.5, "a")
    key = f"runs/r1/checkpoints/00000010/{COMMIT}"
    storage.put(key, storage.read(key)[:-3])
    looks = checkpoint._standing

    def is_slow(*args: object) -> tuple[str | None, Commit | None]:
        found = looks(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(checkpoint, "_standing", looks)
        committed(storage, tmp_path, 10, 0.5, "b", b"meanwhile")
        return found

    monkeypatch.setattr(checkpoint, "_standing", is_slow)
    assert committed(storage, tmp_path, 10, 0.5, "c", b"late").attempt.name == "b"
    assert [commit.attempt.name for commit in read_commits(storage, RUN)] == ["b"]


@pytest.mark.parametrize("what", ["a/model.safetensors", COMMIT])
def test_a_damaged_commit_does_not_stand(storage: Recording, tmp_path: Path, what: str) -> None:
    """Otherwise training from the checkpoint before would end at the damaged one for ever."""
    committed(storage, tmp_path, 10, 0.5, "a", b"first")
    key = f"runs/r1/checkpoints/00000010/{what}"
    storage.put(key, storage.read(key)[:-3])
    second = committed(storage, tmp_path, 10, 0.5, "b", b"second")
    assert second.attempt.name == "b"
    assert fetch_newest(storage, RUN, tmp_path / "here") == second


def test_the_newest_whole_one_is_found_and_the_damage_is_told(
    storage: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = committed(storage, tmp_path, 10, weights=b"before")
    newest = committed(storage, tmp_path, 20, weights=b"newest")
    flip_a_byte(storage, f"{newest.folder}/trainer_state.json")
    with caplog.at_level(logging.ERROR, "tercet"):
        assert fetch_newest(storage, RUN, tmp_path / "here") == before
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"before"
    assert "checkpoint of step 20 is damaged and skipped" in caplog.text


def test_a_commit_that_is_gone_is_told(storage: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be a checkpoint that was never finished; either way there is a warning."""
    before, newest = committed(storage, tmp_path, 10), committed(storage, tmp_path, 20)
    assert fetch_newest(storage, RUN, tmp_path / "newest") == newest
    assert caplog.text == ""
    storage.delete(f"runs/r1/checkpoints/00000020/{COMMIT}")
    assert fetch_newest(storage, RUN, tmp_path / "before") == before
    assert "step 20 has files but no commit that counts" in caplog.text


def test_a_missing_file_is_damage_too(storage: Recording, tmp_path: Path) -> None:
    before, newest = committed(storage, tmp_path, 10), committed(storage, tmp_path, 20)
    storage.delete(f"{newest.folder}/optimizer-00000-of-00001.safetensors")
    assert fetch_newest(storage, RUN, tmp_path / "here") == before


def test_a_checkpoint_deleted_meanwhile_is_not_damage(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that does not know yet that it lost the run deleted it; the newer ones that it committed count."""
    for step in (10, 20):
        committed(storage, tmp_path, step)
    fetches, skipped = checkpoint.fetch, list[int]()

    def is_slow(*args: object) -> Path:
        monkeypatch.setattr(checkpoint, "fetch", fetches)
        for step in (30, 40):
            committed(storage, tmp_path, step)
        retain(storage, RUN, "ndcg@10", 1)
        return fetches(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "fetch", is_slow)
    newest = fetch_newest(storage, RUN, tmp_path / "here", lambda step, _: skipped.append(step))
    assert newest is not None
    assert (newest.step, skipped) == (40, [])
    assert (tmp_path / "here" / "model.safetensors").exists()


def test_if_all_are_damaged_training_starts_from_the_beginning(storage: Recording, tmp_path: Path) -> None:
    flip_a_byte(storage, f"{committed(storage, tmp_path, 10).folder}/model.safetensors")
    assert fetch_newest(storage, RUN, tmp_path / "here") is None
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("damage", ["cut", "refused by storage"])
def test_a_damaged_commit_document_is_skipped(
    storage: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    before, newest = committed(storage, tmp_path, 10), committed(storage, tmp_path, 20)
    key = f"runs/r1/checkpoints/00000020/{COMMIT}"
    whole = storage.read

    def read(asked: str) -> bytes:
        if asked == key:
            raise CorruptObject("its sha256 is another")  # as S3 finds by itself
        return whole(asked)

    if damage == "cut":
        storage.put(key, storage.read(key)[:40])
    else:
        monkeypatch.setattr(storage, "read", read)
    assert read_commits(storage, RUN) == [before]
    assert f"{key}: damaged" in caplog.text
    assert newest.step == 20


@pytest.mark.parametrize("name", ["metrics", "step", "sha256", "another step", "another run"])
def test_no_damage_to_a_commit_document_makes_another_commit(storage: Recording, tmp_path: Path, name: str) -> None:
    before, newest = committed(storage, tmp_path, 10), committed(storage, tmp_path, 20)
    key = f"runs/r1/checkpoints/00000020/{COMMIT}"
    data = storage.read(key)
    elsewhere = newest.model_copy(update={"folder": newest.folder.replace("r1", "r2")})
    damaged = {
        "metrics": data.replace(b'"ndcg@10": 0.5', b'"ndcg@10": 0.7'),
        "step": data.replace(b'"step": 20', b'"step": 30'),
        "sha256": data.replace(newest.files["model.safetensors"].sha256.encode(), b"0" * 64),
        "another step": storage.read(f"runs/r1/checkpoints/00000010/{COMMIT}"),
        "another run": seal(elsewhere),
    }[name]
    assert damaged != data
    storage.put(key, damaged)
    assert read_commits(storage, RUN) == [before]


def test_the_next_best_is_used_if_the_best_is_damaged(
    storage: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step, metric in ((10, 0.7), (20, 0.9), (30, 0.8)):
        committed(storage, tmp_path, step, metric)
    found = read_commits(storage, RUN)
    assert best_whole(storage, found, "ndcg@10") == found[1]
    flip_a_byte(storage, f"{found[1].folder}/optimizer-00000-of-00001.safetensors")
    assert best_whole(storage, found, "ndcg@10") == found[1]  # the model is whole
    assert caplog.text == ""
    flip_a_byte(storage, f"{found[1].folder}/model.safetensors")
    assert best_whole(storage, found, "ndcg@10") == found[0]
    assert "the best checkpoint, of step 20, is damaged" in caplog.text
    for commit in (found[0], found[2]):
        storage.delete(f"{commit.folder}/model.safetensors")
    assert best_whole(storage, found, "ndcg@10") is None


def record(step: int, **metrics: float) -> Commit:
    return Commit(step=step, epoch=1.0, lineage=lineage("a"), folder="f", metrics=metrics, files={})


def test_best_is_the_highest_and_the_earlier_of_equals() -> None:
    commits = [record(30, m=0.7), record(20, m=0.9), record(10, m=0.9), record(40, other=5.0)]
    assert best_commit(commits, "m") == commits[2]
    assert best_commit(reversed(commits), "m") == commits[2]
    assert best_commit(commits, "other") == commits[3]
    assert best_commit(commits, "none") is None


# --- what comes too late --------------------------------------------------------------------------------------------


def test_what_an_attempt_commits_after_another_took_over_does_not_count(storage: Recording, tmp_path: Path) -> None:
    """It was disconnected from step 10 on, and comes back."""
    cut_off = Lease(storage, RUN, "one", 60)
    first = (cut_off.begin("a", 0, 1),)
    for step in (10, 20):
        upload_part(storage, trained(tmp_path, b"late"), attempt_folder(RUN, step, "a"), rank=0)
    commit_step(storage, RUN, 10, 1.0, {"m": 0.5}, first, wait_seconds=1)
    cut_off.release()
    lease = Lease(storage, RUN, "two", 60)
    second = (*first, lease.begin("b", 10, 1))
    commit_step(storage, RUN, 20, 2.0, {"m": 0.9}, first, wait_seconds=1)  # it believes that this counts
    assert storage.exists(f"runs/{RUN}/checkpoints/00000020/{COMMIT}")
    assert [commit.step for commit in read_commits(storage, RUN)] == [10]
    assert fetch_newest(storage, RUN, tmp_path / "newest") == read_commits(storage, RUN)[0]
    upload_part(storage, trained(tmp_path, b"right"), attempt_folder(RUN, 20, "b"), rank=0)
    commit_step(storage, RUN, 20, 2.0, {"m": 0.6}, second, wait_seconds=1)
    newest = read_commits(storage, RUN)[0]
    assert (newest.step, newest.attempt.name, newest.metrics) == (20, "b", {"m": 0.6})
    assert (fetch(storage, newest, tmp_path / "right") / "model.safetensors").read_bytes() == b"right"
    lease.release()


@pytest.mark.parametrize("lost", ["gone", "old"])
def test_it_does_not_count_even_if_the_lease_is_lost(storage: Recording, tmp_path: Path, lost: str) -> None:
    """The commits of the later attempt name it."""
    lease = Lease(storage, RUN, "one", 60)
    first = (lease.begin("a", 0, 1),)
    lease.release()
    old = storage.read(lease_key(RUN))
    lease = Lease(storage, RUN, "two", 60)
    second = (*first, lease.begin("b", 10, 1))
    lease.release()
    for step, attempt in ((20, second), (30, first)):
        upload_part(storage, trained(tmp_path), attempt_folder(RUN, step, attempt[-1].name), rank=0)
        commit_step(storage, RUN, step, 1.0, {}, attempt, wait_seconds=1)
    if lost == "gone":
        storage.delete(lease_key(RUN))
    else:
        storage.put(lease_key(RUN), old)
    assert [commit.step for commit in read_commits(storage, RUN)] == [20]


def test_a_late_commit_does_not_replace_one_that_counts(storage: Recording, tmp_path: Path) -> None:
    lease = Lease(storage, RUN, "one", 60)
    first = (lease.begin("a", 0, 1),)
    lease.release()
    lease = Lease(storage, RUN, "two", 60)
    second = (lease.begin("b", 0, 1),)
    for name, attempt in (("b", second), ("a", first)):
        upload_part(storage, trained(tmp_path), attempt_folder(RUN, 10, name), rank=0)
        assert commit_step(storage, RUN, 10, 1.0, {}, attempt, wait_seconds=1).attempt.name == "b"
    assert [commit.attempt.name for commit in read_commits(storage, RUN)] == ["b"]
    lease.release()


# --- what stays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "kept"), [(10, [40, 30, 10]), (40, [40, 30]), (30, [40, 30]), (20, [40, 30, 20])])
def test_the_newest_two_and_the_best_stay(storage: Recording, tmp_path: Path, best: int, kept: list[int]) -> None:
    for step in (10, 20, 30, 40):
        committed(storage, tmp_path, step, metric=0.9 if step == best else 0.5 - step / 1000)
        retain(storage, RUN, "ndcg@10", 2)
        assert step in [commit.step for commit in read_commits(storage, RUN)]
    left = read_commits(storage, RUN)
    # Before it was made, the best was the first.
    assert [commit.step for commit in left] == kept
    for commit in left:
        fetch(storage, commit, tmp_path / str(commit.step))
    assert {key.split("/")[3] for key in storage.list(f"runs/{RUN}/checkpoints")} == {f"{step:08d}" for step in kept}


def test_checkpoints_without_an_evaluation_are_not_best(storage: Recording, tmp_path: Path) -> None:
    committed(storage, tmp_path, 10, metric=0.1)
    for step in (20, 30, 40):
        folder = attempt_folder(RUN, step, "a")
        upload_part(storage, trained(tmp_path), folder, rank=0)
        commit_step(storage, RUN, step, 1.0, {}, lineage("a"), wait_seconds=1)
        retain(storage, RUN, "ndcg@10", 2)
    assert [commit.step for commit in read_commits(storage, RUN)] == [40, 30, 10]


def test_an_interrupted_deletion_leaves_no_partial_checkpoint_and_is_completed(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        committed(storage, tmp_path, step, metric=step / 100)
    delete, deleted = storage.delete, []

    def dies_at_the_second(prefix: str) -> None:
        if deleted:
            raise StorageUnavailable("gone")
        deleted.append(prefix)
        delete(prefix)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", dies_at_the_second)
        with pytest.raises(StorageUnavailable):
            retain(storage, RUN, "ndcg@10", 2)
    assert [commit.step for commit in read_commits(storage, RUN)] == [30, 20]
    assert storage.list(f"runs/{RUN}/checkpoints/00000010")
    retain(storage, RUN, "ndcg@10", 2)
    assert storage.list(f"runs/{RUN}/checkpoints/00000010") == []


def test_files_of_dead_attempts_are_deleted_and_those_in_progress_kept(storage: Recording, tmp_path: Path) -> None:
    for step, attempt in ((10, "dead"), (20, "dead"), (30, "alive")):
        upload_part(storage, trained(tmp_path), attempt_folder(RUN, step, attempt), rank=0)
    committed(storage, tmp_path, 10)
    committed(storage, tmp_path, 20)
    retain(storage, RUN, "ndcg@10", 2)
    folders = {"/".join(key.split("/")[3:5]) for key in storage.list(f"runs/{RUN}/checkpoints")}
    assert folders == {"00000010/a", "00000010/COMMIT", "00000020/a", "00000020/COMMIT", "00000030/alive"}


def test_an_unreadable_commit_is_left_to_the_user(storage: Recording, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        committed(storage, tmp_path, step, metric=step / 100)
    storage.put(f"runs/{RUN}/checkpoints/00000010/{COMMIT}", b"{")
    retain(storage, RUN, "ndcg@10", 2)
    kept = {key.split("/")[3] for key in storage.list(f"runs/{RUN}/checkpoints")}
    assert kept == {"00000010", "00000030", "00000040"}
    assert storage.exists(f"{attempt_folder(RUN, 10, 'a')}/model.safetensors")


def test_model_files_are_those_without_the_trainers_state() -> None:
    files = {name: FileRecord(sha256="0", num_bytes=1) for name in FILES}
    assert set(record(1).model_copy(update={"files": files}).model_files()) == MODEL_FILES


def test_best_is_the_model_alone_with_its_card(storage: Recording, tmp_path: Path) -> None:
    commit = committed(storage, tmp_path, 10)
    assert read_best(storage, RUN) is None
    storage.written.clear()
    best = publish_best(storage, RUN, commit, "# A card")
    assert storage.written[-1] == "runs/r1/best/COMMIT"
    assert set(best.files) == {*MODEL_FILES, "README.md"}
    assert read_best(storage, RUN) == best
    fetch(storage, best, tmp_path / "here")
    assert (tmp_path / "here" / "README.md").read_text() == "# A card"
    assert best.files["model.safetensors"] == commit.files["model.safetensors"]


def test_publishing_best_again_does_nothing(storage: Recording, tmp_path: Path) -> None:
    commit = committed(storage, tmp_path, 10)
    best = publish_best(storage, RUN, commit, "# A card")
    storage.written.clear()
    assert publish_best(storage, RUN, commit, "# Another card") == best
    assert storage.written == []


def test_another_best_replaces_every_file(storage: Recording, tmp_path: Path) -> None:
    publish_best(storage, RUN, committed(storage, tmp_path, 10), "# Old")
    storage.put("runs/r1/best/stale.bin", b"of an upload that died")
    best = publish_best(storage, RUN, committed(storage, tmp_path, 20, weights=b"better"), "# New")
    assert read_best(storage, RUN) == best
    assert not storage.exists("runs/r1/best/stale.bin")
    assert storage.read("runs/r1/best/model.safetensors") == b"better"


def test_a_damaged_model_is_never_published(storage: Recording, tmp_path: Path) -> None:
    commit = committed(storage, tmp_path, 10)
    flip_a_byte(storage, f"{commit.folder}/model.safetensors")
    with pytest.raises(CorruptObject):
        publish_best(storage, RUN, commit, "# A card")
    assert read_best(storage, RUN) is None


def test_the_wait_for_parts_is_long_enough_and_ends() -> None:
    assert 60 <= checkpoint.PART_WAIT_SECONDS <= 3600


def test_a_reader_of_a_running_run_sees_its_newest_checkpoint(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a listing and the read of a listed commit, a worker commits the next and deletes the last."""
    committed(storage, tmp_path, 10, metric=0.1)
    read, seen = storage.read, []

    def reads_late(key: str) -> bytes:
        if key.endswith(COMMIT) and not seen:
            seen.append(key)
            committed(storage, tmp_path, 20, metric=0.2)
            retain(storage, RUN, "ndcg@10", 1)
        return read(key)

    monkeypatch.setattr(storage, "read", reads_late)
    assert [commit.step for commit in read_commits(storage, RUN)] == [20]


def test_a_commit_that_is_listed_but_never_there_raises(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(storage, tmp_path, 10)
    monkeypatch.setattr(storage, "list", lambda prefix: [f"{prefix}/00000020/{COMMIT}"])
    with pytest.raises(ObjectNotFound, match="00000020"):
        read_commits(storage, RUN)
