"""The contract of storage: read, list, atomic put, put-if-absent, compare-and-swap, upload, download, delete.

A local folder and `s3://bucket/prefix` on any S3 server both guarantee the following, and
`tests/contract/test_storage.py` tests it:

- A reader sees a whole object, old or new, never part of one. A writer that dies leaves the old object.
- Of several writers that `put_if_absent` one key, or `compare_and_swap` from one token, exactly one wins.
- Nothing waits for ever: every call has a deadline, which grows with the bytes to move, never with the retries.
- On S3 each object carries its sha256 as metadata, and every read checks it, because S3 clients do not notice a bit
  flipped in transit. Objects that other programs wrote carry none; give `download` the hash from their manifest.

A token stands for content, not for history: a swap succeeds even if the value changed from A to B and back to A.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import uuid4

from filelock import Timeout

from tercet.errors import (
    AccessDenied,
    AlreadyExists,
    ConfigError,
    Conflict,
    CorruptObject,
    DiskFull,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)

LOCK_TIMEOUT_SECONDS = 120.0  # the lock is held only to hash a small file, rename it and sync its folders
READ_ATTEMPTS = 3  # a bit flipped in transit is gone on re-read; one on disk is not
CHUNK_BYTES = 1024 * 1024

logger = logging.getLogger("tercet")
Keys = list[str]  # in the classes below, `list` is a method
retries: Counter[str] = Counter()  # requests that this process repeated, by reason
ANYTHING = "*"  # for `_write`: replace any object


class Fetched(NamedTuple):
    sha256: str  # of the received bytes
    recorded: str | None  # sha256 stored with the object, if any
    token: str


class Storage(ABC):
    """Objects under one root, named by keys such as `runs/r1/plan.json`. Safe to share by threads, and picklable.

    Besides the errors named at each method, every call may raise AccessDenied, BucketNotFound, StorageUnavailable (no
    answer by the deadline), DiskFull, or StorageError (an impossible key, an unexpected answer)."""

    uri: str  # the root without a trailing slash; for a local folder its absolute path

    def uri_of(self, key: str) -> str:
        """Return the full URI, or the absolute path, of an object."""
        return f"{self.uri}/{checked_key(key)}"

    def read(self, key: str) -> bytes:
        """Return all bytes of an object. Raises ObjectNotFound, CorruptObject."""
        return self.read_versioned(key)[0]

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """Return all bytes of an object, and its token for `compare_and_swap`. Raises ObjectNotFound, CorruptObject."""
        sink = io.BytesIO()
        token = self._verified(key, sink, None)
        return sink.getvalue(), token

    def download(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object to a local file by way of a temporary file beside it, so `path` is whole or untouched.

        Raises ObjectNotFound; CorruptObject if the bytes differ from `sha256`, or from the hash on S3, even when read
        again."""
        temp = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        with local_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temp.open("w+b") as sink:
                    self._verified(key, sink, sha256)
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)

    def put(self, key: str, data: bytes) -> None:
        """Write an object atomically, replacing any earlier one."""
        self._write(key, data, ANYTHING)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write an object that must not exist yet. Raises AlreadyExists."""
        try:
            self._write(key, data, None)
        except Conflict:
            raise AlreadyExists(f"{self.uri_of(key)} already exists") from None

    def compare_and_swap(self, key: str, data: bytes, token: str | None) -> str:
        """Replace the object that has `token` (None: the object must be absent). Returns the new token.

        Raises Conflict, and leaves the object as it is, if the object has another token: read it and decide again. One
        limit, on S3 only: if the reply to a successful swap is lost, and another writer swaps again before this one
        retries, this one raises Conflict."""
        return self._write(key, data, token)

    def _verified(self, key: str, sink: IO[bytes], sha256: str | None) -> str:
        for _ in range(READ_ATTEMPTS):
            sink.seek(0)
            sink.truncate()
            got = self._fetch(key, sink)
            wrong = [want for want in (sha256, got.recorded) if want not in (None, got.sha256)]
            if not wrong:
                return got.token
            retries["sha256"] += 1
            logger.warning("%s: sha256 is %s, not %s; reading it again", self.uri_of(key), got.sha256, wrong[0])
        damage = CorruptObject(
            f"{self.uri_of(key)} is damaged: its sha256 is {got.sha256}, not {wrong[0]} ({READ_ATTEMPTS} reads)",
            "The stored bytes are not the bytes that were written. Restore the object, or use an earlier version.",
        )
        damage.token = got.token
        raise damage

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object with exactly this key. A folder is not an object."""

    @abstractmethod
    def list(self, prefix: str) -> Keys:
        """Return the sorted keys of all objects below the folder `prefix` ("" is the root), at any depth."""

    @abstractmethod
    def upload(self, path: Path, key: str, move: bool = False) -> None:
        """Write an object atomically from a local file of any size, replacing any earlier one.

        move: the file is not needed afterwards. A folder on the same file system then takes it instead of a copy."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Delete the object `prefix` and all objects below the folder `prefix`, if any; never the whole root."""

    @abstractmethod
    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        """Write the object to `sink`, which is empty."""

    @abstractmethod
    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        """Write if the token is `expected` (None: absent, ANYTHING: any), else raise Conflict. Return the new one."""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a local file, in constant memory."""
    return digest_of(path, hashlib.sha256())


def digest_of(path: Path, digest: Any) -> str:
    """Return the hex digest of a local file, in constant memory. `digest` is an unused hash object."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def checked_key(key: str) -> str:
    """Return the key without a trailing slash. Raises StorageError for a key that some kind of storage cannot hold."""
    parts = key.removesuffix("/").split("/")
    if {"", ".", ".."} & {*parts} or any(ord(letter) < 32 for letter in key):
        raise StorageError(f"{key!r} cannot be a key", "A key is a relative path such as runs/r1/plan.json.")
    return "/".join(parts)


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Raise errors of the operating system as tercet errors."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ObjectNotFound(f"file {error.filename or path} does not exist") from error
    except PermissionError as error:
        raise AccessDenied(f"no permission for {error.filename or path}", "Check its owner and mode.") from error
    except Timeout as error:
        what = f"another process has held {error.lock_file} for over {LOCK_TIMEOUT_SECONDS:.0f} s"
        raise StorageUnavailable(what, f"Find the process: fuser {error.lock_file}") from error
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: {error}", "Check the free space and the health of that disk.") from error


def expand_home(path: str | Path) -> Path:
    """Expand `~/x` and `~name/x` as a shell does. Raises ConfigError for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: this machine has no home folder for that user", hint="Write the path in full."
        ) from None
