"""Uploads run in the background, and none fails unnoticed."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from support.checkpoints import RUN, Recording, lineage, trained
from support.waiting import wait_until
from tercet.artifacts.checkpoint import read_commits
from tercet.artifacts.uploader import Uploader
from tercet.errors import LeaseLost, StorageError
from tercet.storage.layout import attempt_folder


@pytest.fixture
def storage(tmp_path: Path) -> Recording:
    return Recording(tmp_path / "storage")


def test_the_uploader_commits_off_the_calling_thread(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)
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
    monkeypatch.setattr(storage, "upload", lambda path, key, move: (go_on.wait(10), upload(path, key, move)))
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    assert read_commits(storage, RUN) == []  # and here we are, while it hangs
    go_on.set()
    uploader.close()
    assert len(read_commits(storage, RUN)) == 1


def test_only_rank_0_commits(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, lineage("a", 2), rank=1)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: pytest.fail("rank 1 committed"))
    uploader.close()
    assert storage.exists(f"{attempt_folder(RUN, 10, 'a')}/rank-1.json")
    assert read_commits(storage, RUN) == []


@pytest.mark.parametrize("raised_by", ["submit", "close"])
def test_a_failed_upload_ends_the_run(
    storage: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised_by: str
) -> None:
    failed = threading.Event()

    def fail(*_: object, **__: object) -> None:
        failed.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(storage, "upload", fail)
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    assert failed.wait(60)
    if raised_by == "submit":
        wait_until(lambda: uploader._error is not None)  # the thread keeps it right after `failed`
        with pytest.raises(StorageError, match="the disk is full"):
            uploader.submit(trained(tmp_path), 20, 1.0, {}, lambda _: None)
    with pytest.raises(StorageError, match="the disk is full"):
        uploader.close()
    assert read_commits(storage, RUN) == []


def test_an_attempt_that_lost_the_run_uploads_nothing(storage: Recording, tmp_path: Path) -> None:
    def confirm() -> None:
        raise LeaseLost("taken over")

    uploader = Uploader(storage, RUN, lineage("a"), 0, confirm)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    with pytest.raises(LeaseLost):
        uploader.close()
    assert storage.written == []


def test_files_are_written_off_the_calling_thread_and_their_hashes_kept(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)
    folder, go_on = trained(tmp_path), threading.Event()

    def write() -> dict[str, str]:
        go_on.wait(10)
        (folder / "late").write_bytes(b"late")
        return {"late": hashlib.sha256(b"late").hexdigest()}

    uploader.write_later(write)
    uploader.submit(folder, 10, 1.0, {}, lambda _: None)
    assert not uploader._written.is_set()
    assert storage.written == []  # nothing of the checkpoint counts before all of its files are there
    go_on.set()
    uploader.wait_until_written()
    uploader.close()
    (commit,) = read_commits(storage, RUN)
    assert storage.read(f"{commit.folder}/late") == b"late"
    assert commit.files["late"].sha256 == hashlib.sha256(b"late").hexdigest()


def test_an_error_of_writing_ends_the_run_and_nobody_waits_for_ever(storage: Recording, tmp_path: Path) -> None:
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)

    def write() -> dict[str, str]:
        raise OSError("no space left on device")

    uploader.write_later(write)
    uploader.submit(trained(tmp_path), 10, 1.0, {}, lambda _: None)
    with pytest.raises(OSError, match="no space left"):
        uploader.wait_until_written()
    with pytest.raises(OSError, match="no space left"):
        uploader.close()
    assert storage.written == []


def test_a_folder_on_the_same_file_system_takes_the_files_themselves(storage: Recording, tmp_path: Path) -> None:
    folder = trained(tmp_path)
    number = (folder / "model.safetensors").stat().st_ino
    uploader = Uploader(storage, RUN, lineage("a"), rank=0)
    uploader.submit(folder, 10, 1.0, {}, lambda _: None)
    uploader.close()
    key = f"{attempt_folder(RUN, 10, 'a')}/model.safetensors"
    assert Path(storage.uri_of(key)).stat().st_ino == number
