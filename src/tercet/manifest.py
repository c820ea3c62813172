"""A dataset version: what it holds, how it is named, how it becomes visible.

    datasets/<name>/versions/<version>/shards/<split>-00000-of-00003.parquet
    datasets/<name>/versions/<version>/quarantine.jsonl      bad rows, if there were any
    datasets/<name>/versions/<version>/manifest.json         written last: without it there is no such version
    datasets/<name>/HEAD.json                                the newest version, moved by compare-and-swap

A version is named by what is in it (`content_id`), so building the same rows twice gives the same version.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from tercet import __version__
from tercet.checks import is_text
from tercet.errors import AlreadyExists, Conflict, CorruptObject, DataError, DatasetNotFound, ObjectNotFound
from tercet.sealed import seal, unseal
from tercet.splits import SplitRule
from tercet.storage import Storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEAD_ATTEMPTS = 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Shard(_Frozen):
    """One Parquet file of one split."""

    path: str
    """Relative to the version, e.g. `shards/train-00000-of-00003.parquet`."""
    num_rows: int
    num_bytes: int
    sha256: str
    version: str | None = None
    """The version that it lies in, where that is an earlier one which this one adds to."""


class TextStatistics(_Frozen):
    """Lengths of one column's texts in characters, over the rows of all splits."""

    mean_chars: float
    max_chars: int


class Source(_Frozen):
    """A file that rows were read from."""

    name: str
    """The path or URI as it was given."""
    sha256: str
    num_rows: int
    """Rows read from it, bad ones included."""


class Manifest(_Frozen):
    """One immutable version of a dataset."""

    format: Literal[1] = 1
    dataset: str
    version: str
    columns: tuple[str, ...]
    """As in the shards: anchor, positive, negatives if any, group if any, slices if any (`slice_<name>`); all text."""
    splits: dict[str, tuple[Shard, ...]]
    """train, eval, test; a split without rows has no shards."""
    split_rule: SplitRule
    num_rows: dict[str, int]
    """Good rows of each split."""
    bad_rows: dict[str, int] = {}
    """Quarantined rows by kind (`checks.BadKind`)."""
    num_duplicate_rows: int = 0
    """A warning: rows that equal an earlier row. They are in the shards."""
    num_leaked_rows: int = 0
    """Rows that were left out, because a later split (of train, eval, test) has their anchor and positive too. They are
    in the quarantine."""
    text_statistics: dict[str, TextStatistics] = {}
    sources: tuple[Source, ...] = ()
    created_at: datetime
    tercet_version: str = __version__
    parent: str | None = None
    """The version that was HEAD when this one was built; of appended rows, the one that they were added to."""
    num_repeated_rows: int = 0
    """Rows that were not added, because they were there already."""
    num_near_copies: int = 0
    """Rows that were not added, because they are near copies of rows on the other side: of train, or of eval and test.
    They are in the quarantine."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are encoded: not `group`, nor slices."""
        return tuple(filter(is_text, self.columns))

    @property
    def num_bad_rows(self) -> int:
        """Quarantined rows of all kinds."""
        return sum(self.bad_rows.values())

    @property
    def new_rows(self) -> dict[str, int]:
        """Good rows of each split that the version before does not have."""
        return {
            split: sum(shard.num_rows for shard in shards if shard.version is None)
            for split, shards in self.splits.items()
        }

    def key_of(self, shard: Shard) -> str:
        """Where one of its shards lies in storage."""
        return f"{version_prefix(self.dataset, shard.version or self.version)}/{shard.path}"

    @property
    def content(self) -> str:
        """What `version` must be for the content this manifest describes."""
        return content_id(self.columns, self.split_rule, self.splits)


def content_id(columns: tuple[str, ...], rule: SplitRule, splits: Mapping[str, tuple[Shard, ...]]) -> str:
    """The name of a version: 16 hex digits over its columns, its split rule and its shards in order.

    Where rows came from, when, and what was quarantined are not in it. The shards' bytes are, and another version
    of pyarrow may write the same rows as other bytes: then they are another version.
    """
    shards = {split: [shard.model_dump(exclude_none=True) for shard in splits[split]] for split in sorted(splits)}
    canonical = {"columns": columns, "split_rule": rule.model_dump(), "splits": shards}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]


def dataset_prefix(name: str) -> str:
    """The key prefix of a dataset, without a slash at its end. Raises DataError for a name that cannot be one."""
    return f"datasets/{_checked(name, 'dataset')}"


def version_prefix(name: str, version: str) -> str:
    """The key prefix of a version. Raises DataError for a name or version that cannot be one."""
    return f"{dataset_prefix(name)}/versions/{_checked(version, 'version')}"


def list_datasets(storage: Storage) -> list[str]:
    """The names of the datasets that have a published version, sorted."""
    return _names(storage, "datasets/", "/HEAD.json")


def list_versions(storage: Storage, name: str) -> list[str]:
    """The versions that have a manifest, sorted by id (which says nothing about their age)."""
    return _names(storage, f"{dataset_prefix(name)}/versions/", "/manifest.json")


def read_manifest(storage: Storage, name: str, version: str = "latest") -> Manifest:
    """Read one version; "latest" is the one HEAD.json names.

    Raises DatasetNotFound with what does exist, CorruptObject where a manifest is damaged, or of another version.
    """
    if version == "latest":
        version = read_head(storage, name) or _not_found(storage, name, None)
    try:
        data = storage.read(f"{version_prefix(name, version)}/manifest.json")
    except ObjectNotFound:
        _not_found(storage, name, version)
    uri = storage.uri_of(f"{version_prefix(name, version)}/manifest.json")
    hint = "Build the version again, or use another one."
    manifest = unseal(Manifest, data, uri, hint)
    if (manifest.dataset, manifest.content) != (name, version):
        raise CorruptObject(f"{uri} describes {manifest.dataset} with other content ({manifest.content})", hint)
    return manifest


def read_head(storage: Storage, name: str) -> str | None:
    """The newest version's id, or None where nothing was published yet."""
    head, _ = _read_head(storage, name)
    return None if head is None else str(head["version"])


def publish(storage: Storage, manifest: Manifest, after: str | None = None) -> Manifest:
    """Make a version visible, then the newest. Its shards must be in storage already. With `after`, only where that is
    the newest.

    Returns what storage holds: `manifest`, or the one of an earlier build of the same content, unless that is damaged:
    then it is replaced. Publishing twice is safe; of two publishers at once both versions exist, and the later one is
    HEAD. Raises DataError where `manifest.version` is not the id of its content, Conflict where HEAD kept changing, or
    is not `after`.
    """
    if manifest.version != manifest.content:
        raise DataError(f"version {manifest.version} describes content {manifest.content}", "Use content_id().")
    if after is not None:
        _check_newest(read_head(storage, manifest.dataset), manifest, after)
    key = f"{version_prefix(manifest.dataset, manifest.version)}/manifest.json"
    try:
        storage.put_if_absent(key, seal(manifest))
    except AlreadyExists:
        try:
            manifest = read_manifest(storage, manifest.dataset, manifest.version)
        except CorruptObject:
            storage.put(key, seal(manifest))
    _move_head(storage, manifest, after)
    return manifest


def _check_newest(newest: str | None, manifest: Manifest, after: str) -> None:
    if newest not in (after, manifest.version):
        what = f"the newest version of {manifest.dataset} is {newest}, not {after}"
        raise Conflict(what, "Another writer published meanwhile: the same command again starts from that version.")


def _move_head(storage: Storage, manifest: Manifest, after: str | None) -> None:
    key, version = f"{dataset_prefix(manifest.dataset)}/HEAD.json", manifest.version
    for attempt in range(_HEAD_ATTEMPTS):
        head, token = _read_head(storage, manifest.dataset)
        if head is not None and head["version"] == version:
            return
        if after is not None:
            _check_newest(None if head is None else str(head["version"]), manifest, after)
        generation = 1 if head is None else int(head["generation"]) + 1
        updated_at = datetime.now(UTC).isoformat(timespec="seconds")
        new = {"version": version, "generation": generation, "updated_at": updated_at}
        try:
            storage.compare_and_swap(key, (json.dumps(new) + "\n").encode(), token)
        except Conflict:
            time.sleep(random.SystemRandom().uniform(0, 0.01 * 2 ** min(attempt, 6)))
        else:
            return
    raise Conflict(
        f"{storage.uri_of(key)} changed {_HEAD_ATTEMPTS} times while moving it to {version}",
        "Several publishers are writing this dataset; publish again, nothing is lost.",
    )


def _read_head(storage: Storage, name: str) -> tuple[dict[str, str | int] | None, str | None]:
    key = f"{dataset_prefix(name)}/HEAD.json"
    try:
        data, token = storage.read_versioned(key)
    except ObjectNotFound:
        return None, None
    try:
        head = json.loads(data)
        return {"version": str(head["version"]), "generation": int(head["generation"])}, token
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptObject(
            f"{storage.uri_of(key)} is not a HEAD: {error}", "Delete it and publish a version again."
        ) from error


def _names(storage: Storage, prefix: str, suffix: str) -> list[str]:
    keys = (key[len(prefix) : -len(suffix)] for key in storage.list(prefix) if key.endswith(suffix))
    return sorted(name for name in keys if name and "/" not in name)


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r} cannot name a {what}", "Use letters, digits, '.', '_' and '-', 128 at most.")
    return name


def _not_found(storage: Storage, name: str, version: str | None) -> NoReturn:
    versions = list_versions(storage, name)
    if versions and version is not None:
        message = f"dataset {name!r} has no version {version!r} in {storage.uri}"
        what, wanted, existing = "versions", version, versions
    else:
        message = f"no dataset {name!r} in {storage.uri}"
        what, wanted, existing = "datasets", name, list_datasets(storage)
    if not existing:
        raise DatasetNotFound(message, "No dataset was published there yet.")
    close = difflib.get_close_matches(wanted, existing, 1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    more = ", ..." if len(existing) > 20 else ""
    raise DatasetNotFound(message, f"{meant}The {what} there: {', '.join(existing[:20])}{more}.")
