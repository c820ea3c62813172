"""The one door to storage: a local folder, or `s3://bucket/prefix` on any S3 server.

    open_storage(uri) -> Storage      read, list, atomic put, put-if-absent, compare-and-swap, upload, download, delete

What both kinds guarantee, and `tests/contract/test_storage.py` holds them to:

- A reader sees an object whole, old or new, never a part of one; a writer that dies leaves the old one.
- Of several that `put_if_absent` one key, or `compare_and_swap` from one token, exactly one wins.
- Nothing waits for ever: every call ends by a deadline that grows with the bytes it moves, never with the retries.
- On S3 each object carries its own sha256 as metadata, and every read checks it: a bit flipped on the way is silent
  in S3 clients. Objects that something else wrote carry none; give `download` the hash from their manifest.

A token names content, not history: a swap succeeds if the value went from A to B and back to A in between.
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

LOCK_TIMEOUT_S = 120.0  # a local folder's lock is held for one hash of a small file, one rename and the sync of folders
READ_ATTEMPTS = 3  # a flip in transit is gone at the next read; one on the disk is not
CHUNK = 1024 * 1024

log = logging.getLogger(__name__)
Keys = list[str]  # within the classes below, `list` is a method
retries: Counter[str] = Counter()  # what this process tried again, by what was wrong
ANYTHING = "*"  # for `_write`: whatever is there, replace it


class Fetched(NamedTuple):
    sha256: str  # of the bytes that came
    recorded: str | None  # the sha256 that was stored with the object
    token: str


class Storage(ABC):
    """Objects under one root, named by keys such as `runs/r1/plan.json`. Safe to share by threads, and picklable.

    Besides what is named at each method, every call may raise AccessDenied, BucketNotFound, StorageUnavailable (no
    answer by the deadline), or the root StorageError (an impossible key, a full disk, an answer nobody expected).
    """

    uri: str  # the root, without a trailing slash; of a local folder the absolute path

    def uri_of(self, key: str) -> str:
        """The full URI, or absolute path, of an object."""
        return f"{self.uri}/{checked_key(key)}"

    def read(self, key: str) -> bytes:
        """All bytes of an object. ObjectNotFound, CorruptObject."""
        return self.read_versioned(key)[0]

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """All bytes of an object and the token that `compare_and_swap` takes. ObjectNotFound, CorruptObject."""
        sink = io.BytesIO()
        token = self._verified(key, sink, None)
        return sink.getvalue(), token

    def download(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object to a local file, by way of a temporary one beside it: `path` is whole or untouched.

        ObjectNotFound; CorruptObject if the bytes still differ from `sha256` (or the hash on S3) when read again.
        """
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
        """Write an object, replacing what is there, atomically."""
        self._write(key, data, ANYTHING)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write an object that must not exist yet. AlreadyExists."""
        try:
            self._write(key, data, None)
        except Conflict:
            raise AlreadyExists(f"{self.uri_of(key)} already exists") from None

    def compare_and_swap(self, key: str, data: bytes, token: str | None) -> str:
        """Replace the object that `token` names (None: the object must be absent); returns the new token. Conflict.

        Conflict leaves the object as it is: read again and decide again. One limit, on S3 only: if the reply to a
        successful swap is lost, and another writer swaps on top before this one asks again, this one gets a Conflict.
        """
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
            log.warning("%s: sha256 is %s, not %s; reading again", self.uri_of(key), got.sha256, wrong[0])
        damage = CorruptObject(
            f"{self.uri_of(key)} is damaged: its sha256 is {got.sha256}, not {wrong[0]} ({READ_ATTEMPTS} reads)",
            "The stored bytes are not those that were committed. Restore the object, or use the version before it.",
        )
        damage.token = got.token
        raise damage

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Is there an object of exactly this name? (A folder is not an object.)"""

    @abstractmethod
    def list(self, prefix: str) -> Keys:
        """The keys of all objects below the folder `prefix` ("" is the root), at any depth, sorted; [] if none."""

    @abstractmethod
    def upload(self, path: Path, key: str) -> None:
        """Write an object from a local file of any size, replacing what is there, atomically."""

    @abstractmethod
    def delete(self, prefix: str) -> None:
        """Delete the object `prefix` and all below the folder `prefix`; nothing there is fine. Never the whole root."""

    @abstractmethod
    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        """Write the object to `sink`, which is empty."""

    @abstractmethod
    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        """Write if the token is `expected` (None: absent; ANYTHING: always), else Conflict; the new token."""


def sha256_of(path: Path) -> str:
    """The sha256 of a local file, in constant memory."""
    return digest_of(path, hashlib.sha256())


def digest_of(path: Path, digest: Any) -> str:
    """The hex digest of a local file, in constant memory, by a hash that has seen nothing yet."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())


def checked_key(key: str) -> str:
    """The key, if it is one that every kind of storage can hold; a trailing slash is taken off. StorageError."""
    parts = key.removesuffix("/").split("/")
    if {"", ".", ".."} & {*parts} or any(ord(letter) < 32 for letter in key):
        raise StorageError(f"{key!r} cannot be a key", "A key is a relative path such as runs/r1/plan.json.")
    return "/".join(parts)


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Say what the operating system said in this package's words."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ObjectNotFound(f"there is no file {error.filename or path}") from error
    except PermissionError as error:
        raise AccessDenied(f"no permission for {error.filename or path}", "Check its owner and mode.") from error
    except Timeout as error:
        what = f"{error.lock_file} is held by another process for over {LOCK_TIMEOUT_S:.0f} s"
        raise StorageUnavailable(what, f"See which: fuser {error.lock_file}") from error
    except OSError as error:
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: {error}", "Check the free space and the state of that disk.") from error


def expand_home(path: str | Path) -> Path:
    """`~/x` and `~name/x` as the shell takes them. Raises ConfigError for a user whom this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: this machine knows no home folder of that user", hint="write it in full") from None
