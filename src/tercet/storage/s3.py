"""Storage on any S3 server: AWS, MinIO, Ceph and others.

`base.py` states the guarantees; this file makes S3 keep them.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import uuid4

from tercet.errors import (
    Conflict,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from tercet.storage.base import (
    ANYTHING,
    CHUNK_BYTES,
    Fetched,
    Keys,
    Storage,
    checked_key,
    local_errors,
    retries,
    sha256_of,
)
from tercet.storage.s3_errors import as_storage_error, client_errors, error_code

FIRST_CONTACT_SECONDS = 20.0  # for a server that never answered: most likely a wrong endpoint, so fail soon
PATIENCE_SECONDS = 120.0  # for one that answered before: longer than a restart (about 10 s) or a failover
SLOWEST_BYTES_PER_SECOND = 256 * 1024  # deadlines grow by this; a slower transfer counts as stalled
CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS = 5, 30  # per connection; per silence within an answer
PART_BYTES = 8 * 1024 * 1024  # S3 allows 10,000 parts of at least 5 MiB; larger files get larger parts
PART_THREADS = 4


logger = logging.getLogger("tercet")
T = TypeVar("T")


class S3Storage(Storage):
    """A prefix of a bucket. s3fs provides the client and its thread; this class decides on retries and errors.

    Tokens are ETags. Conditional writes are single PUTs, because Ceph's gateway ignores conditions on multipart
    uploads. Each PUT carries a random `writer` as metadata: if a reply is lost and the condition of the retry fails,
    the object itself shows whether the first try wrote it. Unfinished uploads of a killed process stay invisible but
    cost money: give the bucket a lifecycle rule (AbortIncompleteMultipartUpload)."""

    def __init__(self, bucket: str, prefix: str, endpoint: str | None) -> None:
        self._bucket, self._prefix, self._endpoint = bucket, prefix, endpoint
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._opening = threading.Lock()
        self._fs: Any = None
        self._fs_pid, self._answered = 0, False

    def __reduce__(self) -> tuple[type, tuple[str, str, str | None]]:
        return S3Storage, (self._bucket, self._prefix, self._endpoint)

    def exists(self, key: str) -> bool:
        # A listing, because a HEAD answers 404 for a missing object and for a missing bucket alike.
        name = self._name(key)
        entries = self._call("list_objects_v2", name, Prefix=name, MaxKeys=1).get("Contents", [])
        return any(entry["Key"] == name for entry in entries)

    def list(self, prefix: str) -> Keys:
        top = f"{self._prefix}/" if self._prefix else ""
        below = f"{self._name(prefix)}/" if prefix.strip("/") else top
        names: Keys = []
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", below, Prefix=below, **more)
            names += [entry["Key"] for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return sorted(name[len(top) :] for name in names if not name.endswith("/"))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, prefix: str) -> None:
        # One DELETE per object: the bulk request needs checksums that servers disagree on, and hides single failures.
        with ThreadPoolExecutor(PART_THREADS) as pool:
            names = [self._name(prefix), *map(self._name, self.list(prefix))]
            for _ in pool.map(lambda name: self._call("delete_object", name, Key=name), names):
                pass

    def upload(self, path: Path, key: str, move: bool = False) -> None:  # noqa: ARG002 - S3 takes no files
        with local_errors(path):
            size = path.stat().st_size
            if size <= PART_BYTES:
                self._write(key, path.read_bytes(), ANYTHING)
            else:
                self._upload_parts(path, self._name(key), size)

    def _upload_parts(self, path: Path, name: str, size: int) -> None:
        part = max(PART_BYTES, -(-size // 10_000))
        sha256, writer = sha256_of(path), uuid4().hex
        where = {"Key": name, "Metadata": {"sha256": sha256, "writer": writer}}
        where = {"Key": name, "UploadId": self._call("create_multipart_upload", name, **where)["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * part)
                data = file.read(part)
            reply = self._call("upload_part", name, PartNumber=number, **_body(data), **where)
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            with ThreadPoolExecutor(PART_THREADS) as pool:
                parts = [*pool.map(send, range(1, -(-size // part) + 1))]
            if sha256_of(path) != sha256:
                raise StorageError(f"{path} changed while it was uploaded", "Upload a file that no process writes to.")
            self._call("complete_multipart_upload", name, MultipartUpload={"Parts": parts}, **where)
        except BaseException as error:
            if isinstance(error, ObjectNotFound) and self._written_by(name, writer):
                return  # the first "complete" succeeded, but its reply was lost; the second found no upload
            with suppress(StorageError):
                self._call("abort_multipart_upload", name, **where)
            raise

    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        name = self._name(key)

        def attempt(deadline: _Deadline) -> Fetched:
            sink.seek(0)
            sink.truncate()
            digest = hashlib.sha256()
            reply = self._request("get_object", deadline, Key=name)
            deadline.allow(reply["ContentLength"])
            try:
                while chunk := self._wait(deadline, reply["Body"].read, CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
            finally:
                self._filesystem().loop.call_soon_threadsafe(reply["Body"].close)
            return Fetched(digest.hexdigest(), reply["Metadata"].get("sha256"), reply["ETag"].strip('"'))

        return self._retry(name, attempt)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        name, writer = self._name(key), uuid4().hex
        metadata = {"sha256": hashlib.sha256(data).hexdigest(), "writer": writer}
        condition = {} if expected == ANYTHING else {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
        try:
            reply = self._call("put_object", name, Key=name, Metadata=metadata, **_body(data), **condition)
        except (Conflict, ObjectNotFound):  # 404: the object named by If-Match is gone
            if token := self._written_by(name, writer):
                return token
            raise Conflict(
                f"{self.uri_of(key)} has changed", "Another writer changed it: read it and decide again."
            ) from None
        return str(reply["ETag"]).strip('"')

    def _written_by(self, name: str, writer: str) -> str | None:
        """Return the token of the object if `writer` wrote it, else None."""
        try:
            head = self._call("head_object", name, Key=name)
        except ObjectNotFound:
            return None
        return str(head["ETag"]).strip('"') if head["Metadata"].get("writer") == writer else None

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _call(self, method: str, name: str, **parameters: Any) -> dict[str, Any]:
        """Run one S3 operation, with retries."""
        size = len(parameters.get("Body", b""))
        return self._retry(name, lambda deadline: self._request(method, deadline, **parameters), size)

    def _retry(self, name: str, attempt: Callable[[_Deadline], T], size: int = 0) -> T:
        """Repeat `attempt` until it succeeds, fails for good, or the deadline is near. Pauses double, with jitter."""
        self._filesystem()  # now: the deadline is for the server, not for the import of s3fs
        deadline = _Deadline(PATIENCE_SECONDS if self._answered else FIRST_CONTACT_SECONDS)
        deadline.allow(size)
        for number in itertools.count():
            try:
                result = attempt(deadline)
            except client_errors() as error:
                self._answered |= bool(getattr(error, "response", None))
                server = self._endpoint or "Amazon S3"
                problem = as_storage_error(error, server, self._bucket, f"s3://{self._bucket}/{name}")
                # Not the global generator: training seeds it, and alike on all ranks.
                pause = random.SystemRandom().uniform(0, min(5.0, 0.2 * 2**number))
                if not isinstance(problem, StorageUnavailable):
                    raise problem from error
                retries[error_code(error)] += 1
                if pause > deadline.left():
                    raise problem from error
                logger.warning("%s; trying again", problem)
                time.sleep(pause)
            else:
                self._answered = True
                return result
        raise AssertionError("unreachable")

    def _request(self, method: str, deadline: _Deadline, **parameters: Any) -> dict[str, Any]:
        filesystem = self._filesystem()

        async def request() -> dict[str, Any]:
            client = await filesystem.set_session()
            reply: dict[str, Any] = await getattr(client, method)(Bucket=self._bucket, **parameters)
            return reply

        return self._wait(deadline, request)

    def _wait(self, deadline: _Deadline, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        from fsspec.asyn import sync

        result: T = sync(self._filesystem().loop, call, *arguments, timeout=max(deadline.left(), 0.001))
        return result

    def _filesystem(self) -> Any:
        """Return the s3fs instance of this process; its thread and connections do not survive a fork."""
        with self._opening:
            if self._fs_pid != os.getpid():
                from s3fs import S3FileSystem

                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
                config = {
                    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
                    "read_timeout": READ_TIMEOUT_SECONDS,
                    "max_pool_connections": 32,
                    "retries": {"total_max_attempts": 1},  # only `_retry` retries
                    "request_checksum_calculation": "when_required",  # Content-MD5 and sha256 work on every server
                    "response_checksum_validation": "when_required",
                    "s3": {"addressing_style": "path" if self._endpoint else "auto"},
                }
                self._fs = S3FileSystem(
                    endpoint_url=self._endpoint,
                    client_kwargs={"region_name": region},
                    config_kwargs=config,
                    skip_instance_cache=True,
                    use_listings_cache=False,
                )
                self._fs_pid = os.getpid()
            return self._fs


class _Deadline:
    """Time at which a call gives up: its patience, plus the time that its bytes need at the slowest rate."""

    def __init__(self, patience: float) -> None:
        self._patience_ends = self._end = time.monotonic() + patience

    def allow(self, size: int) -> None:
        self._end = self._patience_ends + size / SLOWEST_BYTES_PER_SECOND

    def left(self) -> float:
        return self._end - time.monotonic()


def _body(data: bytes) -> dict[str, Any]:
    md5 = hashlib.md5(data, usedforsecurity=False).digest()  # the server refuses bytes that changed in transit
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}
