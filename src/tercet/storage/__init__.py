"""One contract for a local folder and for S3, and documents that prove they are whole.

- `base`: the contract: read, write, put-if-absent, compare-and-swap, list, delete
- `local`: a folder of this machine, or of a network file system
- `s3`: any S3 server
- `s3_errors`: what S3 servers and clients answer, as tercet errors
- `documents`: JSON documents sealed with their own sha256
- `layout`: every key in storage
"""

from __future__ import annotations

import os
from pathlib import Path

from tercet.errors import ConfigError
from tercet.storage.base import Storage

__all__ = ["Storage", "open_storage"]


def open_storage(uri: str, endpoint_url: str | None = None) -> Storage:
    """Open `s3://bucket[/prefix]`, or a folder (which need not exist yet). Does not touch storage. ConfigError.

    S3 credentials come from where AWS's own tools take them; the endpoint from the argument, AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL; the region from AWS_REGION or AWS_DEFAULT_REGION, else us-east-1, which other servers ignore.
    """
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
        raise ConfigError(f"{uri!r} is not a storage tercet knows", "Use a folder, or s3://bucket/prefix.")
    from tercet.storage.local import LocalStorage

    return LocalStorage(Path(rest if separator else uri))
