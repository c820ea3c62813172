"""The pointer that serving reads: which version of a model is the champion, and every champion before it.

A promotion happens in one moment, the swap of champion.json. A champion is replaced only after it was filed below
champions/. So whenever a process dies, every generation is filed except perhaps the newest, and the newest is
champion.json itself. Each generation holds the sha256 of the one before: the history is provably one chain.
docs/decisions/0011-the-champion.md has the reasons.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from typing import ClassVar, Literal

from tercet.errors import AlreadyExists, ChampionMoved, Conflict, CorruptObject, ObjectNotFound
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.documents import Document, seal, sha256, unseal
from tercet.storage.layout import champion_key, generation_key, served_key

Kind = Literal["gated", "by hand", "rollback"]


class Champion(Document):
    """One generation of the pointer."""

    once_unsealed: ClassVar[bool] = True

    name: str
    generation: int
    """1, 2, 3, …"""
    parent_sha256: str | None
    """sha256 of the stored document of the generation before; None for the first."""
    version: int
    version_sha256: str
    """sha256 of the stored document of the version."""
    kind: Kind
    reason: str
    decision: str | None
    """Key of the gate's decision against the generation before; None for a decision by hand."""
    unix_seconds: float
    who: str
    nonce: str
    """Makes two documents with the same content different, so that a writer recognises its own."""


class Served(Document):
    """A mark: this version has been the champion."""

    name: str
    version: int
    generation: int
    """A generation in which it was; usually the first."""


def read_champion(storage: Storage, name: str) -> Champion | None:
    """Return the present champion, or None if there is none. Raises CorruptObject."""
    data, _ = _read(storage, name)
    return None if data is None else unseal(Champion, data, storage.uri_of(champion_key(name)))


def move_champion(
    storage: Storage,
    expected: Champion | None,
    *,
    name: str,
    version: int,
    version_sha256: str,
    kind: Kind,
    reason: str,
    who: str,
    decision: str | None = None,
) -> Champion:
    """Replace `expected` (None: there is no champion yet) with a version. A rollback is a new generation too, with an
    older version.

    Raises ChampionMoved, and changes nothing, if `expected` is no longer the champion. After StorageUnavailable it is
    unknown whether the champion moved: read it again."""
    data, token = _read(storage, name)
    present = None if data is None else unseal(Champion, data, storage.uri_of(champion_key(name)))
    if present != expected:
        raise _moved(name, present)
    if present is not None and data is not None:
        _file(storage, present, data)
    champion = Champion(
        name=name,
        generation=1 if present is None else present.generation + 1,
        parent_sha256=None if data is None else sha256(data),
        version=version,
        version_sha256=version_sha256,
        kind=kind,
        reason=reason,
        decision=decision,
        unix_seconds=time.time(),
        who=who,
        nonce=uuid.uuid4().hex,
    )
    crash_point("before_champion", champion.generation)
    try:
        storage.compare_and_swap(champion_key(name), seal(champion), token)
    except Conflict:
        if not _became_champion(storage, champion):  # else this swap succeeded, and only its reply was lost
            raise _moved(name, read_champion(storage, name)) from None
    crash_point("after_champion", champion.generation)
    _file(storage, champion, seal(champion))
    return champion


def history(storage: Storage, name: str) -> list[Champion]:
    """Return every champion, the present one first; [] if there is none. Reads every generation.

    Raises CorruptObject if the chain is broken: a generation is missing, or is not the one that the next replaced."""
    data, _ = _read(storage, name)
    chain: list[Champion] = []
    while data is not None:
        chain.append(unseal(Champion, data, f"generation {chain[-1].generation - 1 if chain else 'now'} of {name}"))
        data = _parent(storage, chain[-1])
    if [champion.generation for champion in chain] != list(range(len(chain), 0, -1)):
        raise CorruptObject(
            f"the generations of {name} are not 1, 2, 3, …",
            hint=f"something other than tercet changed {storage.uri_of(champion_key(name))}; restore it",
        )
    return chain


def mark_served(storage: Storage, champion: Champion) -> None:
    """Record that a champion's version has been the champion."""
    served = Served(name=champion.name, version=champion.version, generation=champion.generation)
    with contextlib.suppress(AlreadyExists):
        storage.put_if_absent(served_key(champion.name, champion.version), seal(served))


def _read(storage: Storage, name: str) -> tuple[bytes | None, str | None]:
    try:
        return storage.read_versioned(champion_key(name))
    except ObjectNotFound:
        return None, None


def _file(storage: Storage, champion: Champion, data: bytes) -> None:
    key = generation_key(champion.name, champion.generation)
    try:
        storage.put_if_absent(key, data)
    except AlreadyExists:
        if storage.read(key) != data:
            raise CorruptObject(
                f"{storage.uri_of(key)} differs from the champion that it is a copy of",
                hint="something other than tercet changed one of the two; compare both",
            ) from None
    mark_served(storage, champion)


def _became_champion(storage: Storage, champion: Champion) -> bool:
    """Whether a champion is, or was, in place: the process that replaced it must have filed it."""
    present, _ = _read(storage, champion.name)
    if present == seal(champion):
        return True
    try:
        return storage.read(generation_key(champion.name, champion.generation)) == seal(champion)
    except ObjectNotFound:
        return False


def _parent(storage: Storage, champion: Champion) -> bytes | None:
    if champion.parent_sha256 is None:
        return None
    key = generation_key(champion.name, champion.generation - 1)
    try:
        data = storage.read(key)
    except ObjectNotFound:
        data = b""
    if sha256(data) != champion.parent_sha256:
        raise CorruptObject(
            f"{storage.uri_of(key)} is not the champion that generation {champion.generation} replaced",
            hint="something other than tercet changed or deleted it; the present champion is still valid",
        )
    return data


def _moved(name: str, present: Champion | None) -> ChampionMoved:
    what = "there is none" if present is None else f"it is version {present.version}, generation {present.generation}"
    return ChampionMoved(f"the champion of {name} has changed: {what}", hint="compare with that one")
