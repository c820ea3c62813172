"""Storage on any S3 server: AWS, MinIO, Ceph and the like.

The promises are those of `storage.py`; here is how S3 is brought to keep them.
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
    AccessDenied,
    BucketNotFound,
    Conflict,
    ObjectNotFound,
    StorageError,
    StorageUnavailable,
)
from tercet.storage.base import ANYTHING, CHUNK, Fetched, Keys, Storage, checked_key, local_errors, retries, sha256_of
from tercet.storage.s3_errors import DENIED, TRANSIENT, client_errors

FIRST_CONTACT_S = 20.0  # a server that never answered: most likely a wrong endpoint, so a person is told soon
PATIENCE_S = 120.0  # a server that answered before: outlasts a restart (a gateway takes about 10 s) and a failover
SLOWEST = 256 * 1024  # bytes a second; a slower transfer counts as stalled, and this is what the deadline grows by
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30  # one connection; one silence within an answer
PART = 8 * 1024 * 1024  # S3 allows parts of 5 MiB or more, and 10,000 of them; larger files get larger parts
PART_THREADS = 4


log = logging.getLogger(__name__)
T = TypeVar("T")


class S3Storage(Storage):
    """A prefix of a bucket. s3fs gives the client and the thread it runs on; retries and errors are decided here.

    Tokens are ETags. Pointers are single PUTs, because RGW ignores conditions on multipart uploads. Each PUT bears a
    random `writer`, so that when a reply is lost and the retry meets a condition that no longer holds, the object
    itself tells whether it was written after all. Uploads that a killed process left unfinished stay invisible, but
    are paid for: give the bucket a lifecycle rule (AbortIncompleteMultipartUpload)."""

    def __init__(self, bucket: str, prefix: str, endpoint: str | None) -> None:
        self._bucket, self._prefix, self._endpoint = bucket, prefix, endpoint
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._opening = threading.Lock()
        self._fs: Any = None
        self._fs_pid, self._answered = 0, False

    def __reduce__(self) -> tuple[type, tuple[str, str, str | None]]:
        return S3Storage, (self._bucket, self._prefix, self._endpoint)

    def exists(self, key: str) -> bool:
        # A listing, because the 404 of a HEAD does not tell a missing object from a missing bucket.
        name = self._name(key)
        found = self._call("list_objects_v2", name, Prefix=name, MaxKeys=1).get("Contents", [])
        return any(entry["Key"] == name for entry in found)

    def list(self, prefix: str) -> Keys:
        top = f"{self._prefix}/" if self._prefix else ""
        below = f"{self._name(prefix)}/" if prefix.strip("/") else top
        found: Keys = []
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", below, Prefix=below, **more)
            found += [entry["Key"] for entry in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return sorted(name[len(top) :] for name in found if not name.endswith("/"))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, prefix: str) -> None:
        # One DELETE each: the bulk request demands checksums that servers disagree on, and hides single failures.
        with ThreadPoolExecutor(PART_THREADS) as pool:
            names = [self._name(prefix), *map(self._name, self.list(prefix))]
            for _ in pool.map(lambda name: self._call("delete_object", name, Key=name), names):
                pass

    def upload(self, path: Path, key: str) -> None:
        with local_errors(path):
            size = path.stat().st_size
            if size <= PART:
                self._write(key, path.read_bytes(), ANYTHING)
            else:
                self._upload_parts(path, self._name(key), size)

    def _upload_parts(self, path: Path, name: str, size: int) -> None:
        part = max(PART, -(-size // 10_000))
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
                raise StorageError(f"{path} changed while it was uploaded", "Upload a file that nothing writes to.")
            self._call("complete_multipart_upload", name, MultipartUpload={"Parts": parts}, **where)
        except BaseException as error:
            if isinstance(error, ObjectNotFound) and self._written_by(name, writer):
                return  # the first "complete" succeeded, its reply was lost, and the upload was gone at the second
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
                while chunk := self._wait(deadline, reply["Body"].read, CHUNK):
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
        except (Conflict, ObjectNotFound):  # 404: the object of If-Match is gone
            if token := self._written_by(name, writer):
                return token
            raise Conflict(
                f"{self.uri_of(key)} is not what it was", "Another writer changed it: read again, decide again."
            ) from None
        return str(reply["ETag"]).strip('"')

    def _written_by(self, name: str, writer: str) -> str | None:
        """The token of the object, if it is the one that `writer` wrote."""
        try:
            head = self._call("head_object", name, Key=name)
        except ObjectNotFound:
            return None
        return str(head["ETag"]).strip('"') if head["Metadata"].get("writer") == writer else None

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _call(self, method: str, name: str, **parameters: Any) -> dict[str, Any]:
        """One S3 operation, retried."""
        size = len(parameters.get("Body", b""))
        return self._retry(name, lambda deadline: self._request(method, deadline, **parameters), size)

    def _retry(self, name: str, attempt: Callable[[_Deadline], T], size: int = 0) -> T:
        """Attempt until it succeeds, fails for good, or the deadline is near. Pauses double, with full jitter."""
        self._filesystem()  # what its import takes is not the server's time
        deadline = _Deadline(PATIENCE_S if self._answered else FIRST_CONTACT_S)
        deadline.allow(size)
        for number in itertools.count():
            try:
                result = attempt(deadline)
            except client_errors() as error:
                self._answered |= bool(getattr(error, "response", None))
                problem = self._explain(error, name)
                # Not Python's own random numbers: those are the training's, and alike on all ranks.
                pause = random.SystemRandom().uniform(0, min(5.0, 0.2 * 2**number))
                if not isinstance(problem, StorageUnavailable) or pause > deadline.left():
                    raise problem from error
                log.warning("%s; trying again", problem)
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
        """The s3fs instance of this process: neither its thread nor its connections survive a fork."""
        with self._opening:
            if self._fs_pid != os.getpid():
                from s3fs import S3FileSystem

                region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
                config = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "read_timeout": READ_TIMEOUT_S,
                    "max_pool_connections": 32,
                    "retries": {"total_max_attempts": 1},  # `_retry` is the only one that retries
                    "request_checksum_calculation": "when_required",  # Content-MD5 and sha256 do it on every server
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

    def _explain(self, error: Exception, name: str) -> StorageError:
        """What a failure means. StorageUnavailable is worth another attempt; all else is final."""
        server, what = self._endpoint or "Amazon S3", f"s3://{self._bucket}/{name}"
        response = getattr(error, "response", None) or {}
        code = response.get("Error", {}).get("Code", type(error).__name__)
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("PreconditionFailed", "412"):
            return Conflict(f"{what} is not what it was")
        if code == "NoSuchBucket":
            return BucketNotFound(
                f"{server} has no bucket {self._bucket!r}", "Create it, or check the name, the endpoint and the region."
            )
        if status in (401, 403) or code in DENIED:
            return AccessDenied(
                f"{server} denied access to {what} ({code})",
                "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, that a temporary "
                "token has not expired, that this identity may use the bucket, the region, and this machine's clock.",
            )
        if status == 404:
            return ObjectNotFound(f"there is no {what}")
        if (status and status < 500 and status not in (409, 429) and code not in TRANSIENT) or status == 501:
            return StorageError(f"{server} refused {what}: {error}", "The server does not support this request.")
        if type(error).__name__ in ("ParamValidationError", "InvalidRegionError"):
            return StorageError(f"{what}: {error}", "Check the bucket's name and the region.")
        retries[str(code)] += 1
        return StorageUnavailable(
            f"{server} did not answer for {what} ({code}: {error})",
            "Check that the server runs and can be reached from this machine: the endpoint (AWS_ENDPOINT_URL), "
            "the network, a proxy, TLS certificates (AWS_CA_BUNDLE).",
        )


class _Deadline:
    """When a call gives up: after its patience, and what the bytes it moves need at the slowest."""

    def __init__(self, patience: float) -> None:
        self._patience_ends = self._end = time.monotonic() + patience

    def allow(self, size: int) -> None:
        self._end = self._patience_ends + size / SLOWEST

    def left(self) -> float:
        return self._end - time.monotonic()


def _body(data: bytes) -> dict[str, Any]:
    md5 = hashlib.md5(data, usedforsecurity=False).digest()  # the server refuses bytes that changed on the way
    return {"Body": data, "ContentMD5": base64.b64encode(md5).decode()}
