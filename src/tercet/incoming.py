"""The files that patterns name, here or in object storage."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from tercet.errors import ConfigError
from tercet.storage import open_storage


def find_sources(patterns: Sequence[str], endpoint_url: str | None = None) -> list[str]:
    """The files that patterns such as `incoming/*.jsonl.gz` or `s3://bucket/incoming/*.parquet` name, sorted. A pattern
    without a file gives none; one without a wildcard names a file, whether it exists or not."""
    found: set[str] = set()
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found.add(pattern)
        elif "://" in pattern:
            root, _, name = pattern.rpartition("/")
            if set(root) & set("*?["):
                raise ConfigError(f"{pattern}: only the last part of it may have wildcards")
            keys = open_storage(root, endpoint_url).list("")
            found.update(f"{root}/{key}" for key in keys if "/" not in key and fnmatch.fnmatchcase(key, name))
        else:
            path = Path(pattern).expanduser()
            found.update(str(file) for file in path.parent.glob(path.name) if file.is_file())
    return sorted(found)
