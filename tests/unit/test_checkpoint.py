"""A checkpoint counts from its COMMIT on, and only as long as every byte is what was committed."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from tercet import checkpoint
from tercet.checkpoint import (
    COMMIT,
    Commit,
    FileRecord,
    Uploader,
    attempt_folder,
    best_commit,
    commit_step,
    fetch,
    fetch_newest,
    publish_best,
    read_best,
    read_commits,
    upload_part,
)
from tercet.errors import CorruptObject, StorageError, StorageUnavailable
from tercet.storage import LocalStorage

RUN = "r1"
FILES = {
    "model.safetensors": b"weights",
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
    "optimizer-00000-of-00001.safetensors": b"moments",
    "scheduler.pt": b"rate",
    "trainer_state.json": b"{}",
    "training_args.bin": b"arguments",
    "rng_state_0.pth": b"random",
}
MODEL_FILES = {"model.safetensors", "modules.json", "1_Pooling/config.json"}


class Recording(LocalStorage):
    """A folder that remembers the order of what was written and deleted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def upload(self, path: Path, key: str) -> None:
        super().upload(path, key)
        self.written.append(key)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        token = super()._write(key, data, expected)
        self.written.append(key)
        return token


@pytest.fixture
def storage(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "storage")


def trained(tmp_path: Path, weights: bytes = b"weights", files: dict[str, bytes] | None = None) -> Path:
    """What the trainer left on the disk of one rank."""
    folder = tmp_path / f"out-{time.monotonic_ns()}"
    for name, data in (files or {**FILES, "model.safetensors": weights}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def committed(
    storage: LocalStorage,
    tmp_path: Path,
    step: int,
    metric: float = 0.5,
    attempt: str = "a",
    weights: bytes = b"weights",
) -> Commit:
    upload_part(storage, trained(tmp_path, weights), attempt_folder(RUN, step, attempt), rank=0)
    return commit_step(storage, RUN, step, step / 10, {"ndcg@10": metric}, attempt, world_size=1, wait_seconds=1)


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


def test_without_a_commit_there_is_nothing(storage: Recording, tmp_path: Path) -> None:
    upload_part(storage, trained(tmp_path), attempt_folder(RUN, 10, "a"), rank=0)
    assert read_commits(storage, RUN) == []
    assert fetch_newest(storage, RUN, tmp_path / "here") is None


def test_every_rank_has_its_part_in_it(storage: Recording, tmp_path: Path) -> None:
    folder = attempt_folder(RUN, 10, "a")
    upload_part(storage, trained(tmp_path), folder, rank=0)
    upload_part(storage, trained(tmp_path, files={"rng_state_1.pth": b"other"}), folder, rank=1)
    commit = commit_step(storage, RUN, 10, 1.0, {}, "a", world_size=2, wait_seconds=1)
    assert set(commit.files) == {*FILES, "rng_state_1.pth"}


def test_a_part_that_does_not_come(storage: Recording, tmp_path: Path) -> None:
    upload_part(storage, trained(tmp_path), attempt_folder(RUN, 10, "a"), rank=0)
    started = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"rank-1\.json: did not appear in time"):
        commit_step(storage, RUN, 10, 1.0, {}, "a", world_size=2, wait_seconds=0.2)
    assert time.monotonic() - started < 3
    assert read_commits(storage, RUN) == []


def test_a_part_that_comes_late_is_waited_for(storage: Recording, tmp_path: Path) -> None:
    folder = attempt_folder(RUN, 10, "a")
    upload_part(storage, trained(tmp_path), folder, rank=0)
    late = threading.Timer(0.2, upload_part, (storage, trained(tmp_path, files={"x": b"x"}), folder, 1))
    late.start()
    assert "x" in commit_step(storage, RUN, 10, 1.0, {}, "a", world_size=2, wait_seconds=10).files
    late.join()


def test_of_two_attempts_at_one_step_the_first_stands(storage: Recording, tmp_path: Path) -> None:
    first = committed(storage, tmp_path, 10, 0.5, "a", b"first")
    second = committed(storage, tmp_path, 10, 0.6, "b", b"second")
    assert second == first == read_commits(storage, RUN)[0]
    fetch(storage, second, tmp_path / "here")
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"first"


@pytest.mark.parametrize("what", ["a/model.safetensors", COMMIT])
def test_a_damaged_commit_does_not_stand(storage: Recording, tmp_path: Path, what: str) -> None:
    """Otherwise training from the checkpoint before would end at the damaged one for ever."""
    committed(storage, tmp_path, 10, 0.5, "a", b"first")
    key = f"runs/r1/checkpoints/00000010/{what}"
    storage.put(key, storage.read(key)[:-3])
    second = committed(storage, tmp_path, 10, 0.5, "b", b"second")
    assert second.attempt == "b"
    assert fetch_newest(storage, RUN, tmp_path / "here") == second


def test_the_newest_whole_one_is_found_and_the_damage_is_told(
    storage: Recording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = committed(storage, tmp_path, 10, weights=b"before")
    newest = committed(storage, tmp_path, 20, weights=b"newest")
    flip_a_byte(storage, f"{newest.folder}/trainer_state.json")
    with caplog.at_level(logging.ERROR, "tercet.checkpoint"):
        assert fetch_newest(storage, RUN, tmp_path / "here") == before
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == b"before"
    assert "checkpoint of step 20 is damaged and skipped" in caplog.text


def test_a_missing_file_is_damage_too(storage: Recording, tmp_path: Path) -> None:
    before, newest = committed(storage, tmp_path, 10), committed(storage, tmp_path, 20)
    storage.delete(f"{newest.folder}/optimizer-00000-of-00001.safetensors")
    assert fetch_newest(storage, RUN, tmp_path / "here") == before


def test_all_damaged_is_a_start_from_the_beginning(storage: Recording, tmp_path: Path) -> None:
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


def record(step: int, **metrics: float) -> Commit:
    return Commit(step=step, epoch=1.0, world_size=1, attempt="a", folder="f", metrics=metrics, files={})


def test_best_is_the_highest_and_the_earlier_of_equals() -> None:
    commits = [record(30, m=0.7), record(20, m=0.9), record(10, m=0.9), record(40, other=5.0)]
    assert best_commit(commits, "m") == commits[2]
    assert best_commit(reversed(commits), "m") == commits[2]
    assert best_commit(commits, "other") == commits[3]
    assert best_commit(commits, "none") is None


def test_model_files_are_those_without_the_trainers_state() -> None:
    files = {name: FileRecord(sha256="0", num_bytes=1) for name in FILES}
    assert set(record(1).model_copy(update={"files": files}).model_files()) == MODEL_FILES


def test_the_uploader_commits_off_the_calling_thread(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, "a", rank=0, world_size=1)
    commits: list[tuple[int, int]] = []
    folders = [trained(tmp_path), trained(tmp_path)]
    for step, folder in zip((10, 20), folders, strict=True):
        uploader.submit(folder, step, 1.0, {"m": 0.5}, lambda c: commits.append((c.step, threading.get_ident())))
    uploader.close()
    assert [step for step, _ in commits] == [10, 20]
    assert threading.get_ident() not in {thread for _, thread in commits}
    assert [commit.step for commit in read_commits(storage, RUN)] == [20, 10]
    assert not any(folder.exists() for folder in folders)


def test_submit_does_not_wait_for_storage(storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, upload = threading.Event(), storage.upload
    monkeypatch.setattr(storage, "upload", lambda path, key: (go_on.wait(10), upload(path, key)))
    uploader = Uploader(storage, RUN, "a", rank=0, world_size=1)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    assert read_commits(storage, RUN) == []  # and here we are, while it hangs
    go_on.set()
    uploader.close()
    assert len(read_commits(storage, RUN)) == 1


def test_only_rank_0_commits(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, "a", rank=1, world_size=2)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: pytest.fail("rank 1 committed"))
    uploader.close()
    assert storage.exists(f"{attempt_folder(RUN, 10, 'a')}/rank-1.json")
    assert read_commits(storage, RUN) == []


@pytest.mark.parametrize("raised_by", ["submit", "close"])
def test_a_failed_upload_ends_the_run(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised_by: str
) -> None:
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(storage, "upload", fail)
    uploader = Uploader(storage, RUN, "a", rank=0, world_size=1)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    assert failed.wait(5)
    if raised_by == "submit":
        time.sleep(0.05)  # the thread keeps the error right after `failed`
        with pytest.raises(StorageError, match="the disk is full"):
            uploader.submit(trained(tmp_path), 20, 1.0, {}, lambda _: None)
    with pytest.raises(StorageError, match="the disk is full"):
        uploader.close()
    assert read_commits(storage, RUN) == []


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
