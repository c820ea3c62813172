"""List, read and publish the versions of a dataset. HEAD names the newest."""

from __future__ import annotations

import difflib
import random
import time
from datetime import UTC, datetime
from typing import ClassVar, NoReturn

from tercet.data.manifest import Manifest
from tercet.errors import AlreadyExists, Conflict, CorruptObject, DataError, DatasetNotFound, ObjectNotFound
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, seal, unseal

_HEAD_ATTEMPTS = 20


class Head(Document):
    """The pointer to the newest version of a dataset."""

    once_unsealed: ClassVar[bool] = True

    version: str
    generation: int
    """1, 2, 3, …: how often the pointer was moved."""
    updated_at: str
    """UTC, ISO 8601."""


def list_datasets(storage: Storage) -> list[str]:
    """Return the names of the datasets that have a published version, sorted."""
    return layout.dataset_names(storage.list(layout.DATASETS))


def list_versions(storage: Storage, name: str) -> list[str]:
    """Return the ids of the versions that have a manifest, sorted by id, not by age."""
    return layout.dataset_version_ids(storage.list(layout.dataset_versions_prefix(name)), name)


def read_manifest(storage: Storage, name: str, version: str = "latest") -> Manifest:
    """Read the manifest of one version; "latest" is the one that HEAD names.

    Raises DatasetNotFound, which lists what exists, and CorruptObject if the manifest is damaged or describes another
    version.
    """
    if version == "latest":
        version = read_head(storage, name) or _not_found(storage, name, None)
    try:
        data = storage.read(layout.manifest_key(name, version))
    except ObjectNotFound:
        _not_found(storage, name, version)
    uri = storage.uri_of(layout.manifest_key(name, version))
    hint = "Build the version again, or use another one."
    manifest = unseal(Manifest, data, uri, hint)
    if (manifest.dataset, manifest.content) != (name, version):
        raise CorruptObject(f"{uri} describes {manifest.dataset} with other content ({manifest.content})", hint)
    return manifest


def read_head(storage: Storage, name: str) -> str | None:
    """Return the id of the newest version, or None if nothing was published yet."""
    head, _ = _read_head(storage, name)
    return None if head is None else head.version


def publish(storage: Storage, manifest: Manifest, after: str | None = None) -> Manifest:
    """Make a version visible, then make it the newest. Its shards must be in storage already.

    With `after`, publishes only if that version is still the newest. Publishing twice is safe. If two processes publish
    at once, both versions exist, and HEAD names the later one.

    Returns the stored manifest: `manifest`, or the one of an earlier build of the same content (if that is damaged, it
    is replaced). Raises DataError if `manifest.version` is not the id of its content, Conflict if HEAD kept changing or
    is not `after`.
    """
    if manifest.version != manifest.content:
        raise DataError(f"version {manifest.version} describes content {manifest.content}", "Use content_id().")
    if after is not None:
        _check_newest(read_head(storage, manifest.dataset), manifest, after)
    key = layout.manifest_key(manifest.dataset, manifest.version)
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
        raise Conflict(what, "Another process published meanwhile. Run the command again; it starts from that version.")


def _move_head(storage: Storage, manifest: Manifest, after: str | None) -> None:
    key, version = layout.head_key(manifest.dataset), manifest.version
    for attempt in range(_HEAD_ATTEMPTS):
        head, token = _read_head(storage, manifest.dataset)
        if head is not None and head.version == version:
            return
        if after is not None:
            _check_newest(None if head is None else head.version, manifest, after)
        generation = 1 if head is None else head.generation + 1
        updated_at = datetime.now(UTC).isoformat(timespec="seconds")
        new = Head(version=version, generation=generation, updated_at=updated_at)
        try:
            storage.compare_and_swap(key, seal(new), token)
        except Conflict:
            time.sleep(random.SystemRandom().uniform(0, 0.01 * 2 ** min(attempt, 6)))
        else:
            return
    raise Conflict(
        f"{storage.uri_of(key)} changed {_HEAD_ATTEMPTS} times while moving it to {version}",
        "Several processes publish this dataset. Publish again; no row is lost.",
    )


def _read_head(storage: Storage, name: str) -> tuple[Head | None, str | None]:
    key = layout.head_key(name)
    try:
        data, token = storage.read_versioned(key)
    except ObjectNotFound:
        return None, None
    hint = "Delete it, then publish a version again."
    return unseal(Head, data, storage.uri_of(key), hint), token


def _not_found(storage: Storage, name: str, version: str | None) -> NoReturn:
    versions = list_versions(storage, name)
    if versions and version is not None:
        message = f"dataset {name!r} has no version {version!r} in {storage.uri}"
        what, wanted, existing = "versions", version, versions
    else:
        message = f"no dataset {name!r} in {storage.uri}"
        what, wanted, existing = "datasets", name, list_datasets(storage)
    if not existing:
        raise DatasetNotFound(message, "Storage holds no dataset yet. Publish one with `tercet shard`.")
    close = difflib.get_close_matches(wanted, existing, 1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    more = ", ..." if len(existing) > 20 else ""
    raise DatasetNotFound(message, f"{meant}The {what} there: {', '.join(existing[:20])}{more}.")
