"""Storage in a folder of this machine, or of a network file system whose flock works.

The promises are those of `storage.py`; here is how files are brought to keep them.
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
    CHUNK,
    LOCK_TIMEOUT_S,
    Fetched,
    Keys,
    Storage,
    checked_key,
    expand_home,
    local_errors,
    sha256_of,
)


class LocalStorage(Storage):
    """A folder. Objects are files; `.tercet/` in it holds the lock and what is being written or deleted just now.

    Every change is staged there, synced, and then renamed under one flock, so changes from any process of this machine
    come one after another. Network file systems do as well as their flock does.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(expand_home(root)))  # noqa: PTH100 (links in it stay as the person wrote them)
        self._own = self._root / ".tercet"
        self.uri = str(self._root).rstrip("/")

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return LocalStorage, (self._root,)

    def exists(self, key: str) -> bool:
        with local_errors(self._root):
            return self._path(key).is_file()

    def list(self, prefix: str) -> Keys:
        top = self._path(prefix) if prefix.strip("/") else self._root
        found: Keys = []
        with local_errors(top):
            for folder, folders, files in os.walk(top, onerror=_not_vanished):
                if Path(folder) == self._root and self._own.name in folders:
                    folders.remove(self._own.name)
                found += [str(Path(folder, name).relative_to(self._root)) for name in files]
        return sorted(found)

    def upload(self, path: Path, key: str) -> None:
        target = self._path(key)
        with local_errors(path), self._staged() as temp:
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
            while chunk := file.read(CHUNK):
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
            raise StorageError(f"the key {key!r} is reserved", f"Names in {self._own} are tercet's own.")
        return self._root / checked_key(key)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A free name on the same file system. What a killed process left there goes after a day."""
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
                raise Conflict(f"{target} is not what it was", "Another writer changed it: read again, decide again.")
            folder = target.parent
            changed = {folder, *(above.parent for above in (folder, *folder.parents) if not above.exists())}
            folder.mkdir(parents=True, exist_ok=True)
            temp.replace(target)
            for above in changed:
                _sync(above)

    def _lock(self) -> FileLock:
        return FileLock(self._own / "lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.005, fallback_to_soft=False)


def _not_vanished(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
