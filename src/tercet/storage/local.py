"""Storage in a folder of this machine, or of a network file system with a working flock.

`base.py` states the guarantees; this file makes plain files keep them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from filelock import FileLock

from tercet.errors import Conflict, StorageError
from tercet.storage.base import (
    ANYTHING,
    CHUNK_BYTES,
    LOCK_TIMEOUT_SECONDS,
    Fetched,
    Keys,
    Storage,
    checked_key,
    expand_home,
    local_errors,
    sha256_of,
)


class LocalStorage(Storage):
    """A folder whose files are the objects. `.tercet/` in it holds the lock, and files being written or deleted.

    Every change is staged there, synced, and then renamed under one flock. So changes by all processes of this machine
    happen one after another. On a network file system, that is as reliable as its flock."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(expand_home(root)))  # noqa: PTH100 (links in it stay as the user wrote them)
        self._own = self._root / ".tercet"
        self.uri = str(self._root).rstrip("/")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LocalStorage, (self._root,)

    def exists(self, key: str) -> bool:
        with local_errors(self._root):
            return self._path(key).is_file()

    def list(self, prefix: str) -> Keys:
        top = self._path(prefix) if prefix.strip("/") else self._root
        keys: Keys = []
        with local_errors(top):
            for folder, folders, files in os.walk(top, onerror=_not_vanished):
                if Path(folder) == self._root and self._own.name in folders:
                    folders.remove(self._own.name)
                keys += [str(Path(folder, name).relative_to(self._root)) for name in files]
        return sorted(keys)

    def upload(self, path: Path, key: str, move: bool = False) -> None:
        target = self._path(key)
        with local_errors(path), self._staged() as temp:
            if move and path.stat().st_dev == temp.parent.stat().st_dev:
                path.rename(temp)
            else:
                shutil.copyfile(path, temp)
            self._install(temp, target, ANYTHING)

    def delete(self, prefix: str) -> None:
        target = self._path(prefix)
        if not target.exists():
            return
        with local_errors(target), self._staged() as trash, self._lock():
            if target.exists():
                target.rename(trash)
                _sync(target.parent)

    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        path, digest = self._path(key), hashlib.sha256()
        with local_errors(path), path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
        return Fetched(digest.hexdigest(), None, digest.hexdigest())

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        target = self._path(key)
        with local_errors(target), self._staged() as temp:
            temp.write_bytes(data)
            self._install(temp, target, expected)
        return hashlib.sha256(data).hexdigest()

    def _path(self, key: str) -> Path:
        if checked_key(key).split("/")[0] == self._own.name:
            raise StorageError(f"the key {key!r} is reserved", f"{self._own} is for tercet itself: choose another key.")
        return self._root / checked_key(key)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """Yield an unused path on the same file system. Files of killed processes are deleted after a day."""
        self._own.mkdir(parents=True, exist_ok=True)
        temp = self._own / f"staged-{uuid4().hex}"
        try:
            yield temp
        finally:
            for path in (temp, *(left for left in self._own.glob("staged-*") if _age(left) > 86400)):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _install(self, temp: Path, target: Path, expected: str | None) -> None:
        _sync(temp)
        with self._lock():
            if expected != ANYTHING and (sha256_of(target) if target.is_file() else None) != expected:
                raise Conflict(f"{target} has changed", "Another writer changed it: read it and decide again.")
            folder = target.parent
            changed = {folder, *(above.parent for above in (folder, *folder.parents) if not above.exists())}
            folder.mkdir(parents=True, exist_ok=True)
            temp.replace(target)
            for above in changed:
                _sync(above)

    def _lock(self) -> FileLock:
        return FileLock(self._own / "lock", timeout=LOCK_TIMEOUT_SECONDS, poll_interval=0.005, fallback_to_soft=False)


def _not_vanished(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
