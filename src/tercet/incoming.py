"""The files that patterns name, here or in object storage."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from tercet.errors import ConfigError
from tercet.storage import local_errors, open_storage

_WILDCARDS = set("*?[")


def find_sources(patterns: Sequence[str], endpoint_url: str | None = None) -> list[str]:
    """The files that patterns such as `incoming/*.jsonl.gz` or `s3://bucket/incoming/*.parquet` name, sorted. A pattern
    without a file gives none; one without a wildcard names a file, whether it exists or not.

    Raises ConfigError for a wildcard before the last part, ObjectNotFound or AccessDenied for a local folder that is
    not there or may not be read: that it holds nothing new is not known."""
    found: set[str] = set()
    for pattern in patterns:
        root, _, name = pattern.rpartition("/")
        if not set(pattern) & _WILDCARDS:
            found.add(pattern)
        elif set(root) & _WILDCARDS:
            raise ConfigError(f"{pattern}: only the last part of it may have wildcards", hint="name each folder")
        elif "://" in pattern:
            keys = open_storage(root, endpoint_url).list("")
            found.update(f"{root}/{key}" for key in keys if "/" not in key and fnmatch.fnmatchcase(key, name))
        else:
            folder = Path(pattern).expanduser().parent
            with local_errors(folder):
                files = [path for path in folder.iterdir() if path.is_file()]
            found.update(str(path) for path in files if fnmatch.fnmatchcase(path.name, name))
    return sorted(found)
