"""The files that patterns name, here or in object storage."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from tercet.errors import ConfigError
from tercet.home import expand_home
from tercet.storage import open_storage

_WILDCARDS = set("*?[")


def find_sources(patterns: Sequence[str], endpoint_url: str | None = None) -> list[str]:
    """The files that patterns such as `incoming/*.jsonl.gz` or `s3://bucket/incoming/*.parquet` name, sorted. A pattern
    without a file gives none; one without a wildcard names a file, whether it exists or not.

    Raises ConfigError for a wildcard before the last part, and for a local folder that is not there or may not be read:
    that it holds nothing new is not known."""
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
            try:
                files = [path for path in expand_home(pattern).parent.iterdir() if path.is_file()]
            except OSError as error:
                what, hint = f"{pattern}: {error.filename}: {error.strerror}", "check the path, its owner and its mode"
                raise ConfigError(what, hint) from None
            found.update(str(path) for path in files if fnmatch.fnmatchcase(path.name, name))
    return sorted(found)
