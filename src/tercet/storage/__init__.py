"""One contract for a local folder and for S3; documents that prove they are whole; every key.

- `base`: the contract: read, write, put-if-absent, compare-and-swap, list, delete
- `local`: a folder of this machine, or of a network file system
- `s3`: any S3 server
- `s3_errors`: errors of S3 servers and clients, as tercet errors
- `documents`: JSON sealed with its own sha256
- `layout`: every key in storage, with its purpose
"""

from __future__ import annotations

import os
from pathlib import Path

from tercet.errors import ConfigError
from tercet.storage.base import Storage

__all__ = ["Storage", "open_storage"]


def open_storage(uri: str, endpoint_url: str | None = None) -> Storage:
    """Open `s3://bucket[/prefix]` or a folder, which need not exist yet. Sends no request.

    S3 credentials are found as by the AWS tools. The endpoint is the argument, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
    The region is AWS_REGION, AWS_DEFAULT_REGION or us-east-1; servers other than AWS ignore it. Raises ConfigError for
    an impossible URI or endpoint."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        environment = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
        endpoint = endpoint_url or next(filter(None, environment), None)
        if not bucket:
            raise ConfigError(f"{uri!r} names no bucket", "Write it as s3://bucket/prefix.")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"the S3 endpoint {endpoint!r} is not a URL", "Write it as https://host:port.")
        from tercet.storage.s3 import S3Storage

        return S3Storage(bucket, prefix.strip("/"), endpoint)
    if (separator and scheme != "file") or not (rest or scheme):
        raise ConfigError(f"{uri!r} is not a storage that tercet supports", "Use a folder, or s3://bucket/prefix.")
    from tercet.storage.local import LocalStorage

    return LocalStorage(Path(rest if separator else uri))
