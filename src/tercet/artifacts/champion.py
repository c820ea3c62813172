"""The pointer that serving reads: which version of a model is the champion, and every champion before it.

A promotion happens in one moment, the swap of champion.json. Nobody replaces a champion before it is filed below
champions/, so whoever dies at whatever moment, every generation but perhaps the newest is there, and the newest is
champion.json itself. Each bears the sha256 of the one before: the chain can be proved, and it is a line.
docs/decisions/0011-the-champion.md has the reasons.
"""

from __future__ import annotations

import time
import uuid
from typing import ClassVar, Literal

from tercet.errors import AlreadyExists, ChampionMoved, Conflict, CorruptObject, ObjectNotFound
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.documents import Document, seal, sha256, unseal
from tercet.storage.layout import champion_key, generation_key

Kind = Literal["gated", "by hand", "rollback"]


class Champion(Document):
    """One generation of the pointer."""

    once_unsealed: ClassVar[bool] = True

    name: str
    generation: int
    """1, 2, 3, …"""
    parent_sha256: str | None
    """Of the document of the generation before; None for the first."""
    version: int
    version_sha256: str
    """Of the version's document."""
    kind: Kind
    reason: str
    decision: str | None
    """The key of the gate's decision against the generation before; None where a person decided."""
    unix_seconds: float
    who: str
    nonce: str
    """Makes two documents of equal content different, so that a writer knows its own."""


def read_champion(storage: Storage, name: str) -> Champion | None:
    """The present champion, or None. Raises CorruptObject."""
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
    """Put a version in the place of `expected` (None: there is no champion yet). A rollback is nothing else: a new
    generation, with an older version.

    Raises ChampionMoved when another one is the champion by now; then this changed nothing. After StorageUnavailable it
    is open whether it was done: look again."""
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
        if not _was_champion(storage, champion):  # or it was this swap, and the answer got lost
            raise _moved(name, read_champion(storage, name)) from None
    crash_point("after_champion", champion.generation)
    _file(storage, champion, seal(champion))
    return champion


def history(storage: Storage, name: str) -> list[Champion]:
    """Every champion, the present one first; [] where there is none. Raises CorruptObject where the chain does not
    hold: a generation is missing, or is not the one that the next was put in the place of."""
    data, _ = _read(storage, name)
    chain: list[Champion] = []
    while data is not None:
        chain.append(unseal(Champion, data, f"generation {chain[-1].generation - 1 if chain else 'now'} of {name}"))
        data = _parent(storage, chain[-1])
    if [champion.generation for champion in chain] != list(range(len(chain), 0, -1)):
        raise CorruptObject(
            f"the generations of {name} are not 1, 2, 3, …",
            hint=f"somebody changed {storage.uri_of(champion_key(name))}",
        )
    return chain


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
                f"{storage.uri_of(key)} is not what the champion was", hint="somebody changed it; look at both"
            ) from None


def _was_champion(storage: Storage, champion: Champion) -> bool:
    """Whether a champion is in its place, or was: who replaced it must have filed it."""
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
            hint="somebody changed or deleted it; the present champion is not in doubt",
        )
    return data


def _moved(name: str, present: Champion | None) -> ChampionMoved:
    what = "there is none" if present is None else f"it is version {present.version}, generation {present.generation}"
    return ChampionMoved(f"the champion of {name} is another one by now: {what}", hint="compare with that one")
