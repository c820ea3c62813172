"""Published models: numbered versions, what serving loads, and how a candidate becomes the champion.

The files themselves stay in the run's folder, `runs/<run_id>/best`. champion.py says which version serves.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from filelock import FileLock

from tercet.artifacts.best import read_best
from tercet.artifacts.champion import Champion, Kind, history, move_champion, read_champion
from tercet.artifacts.checkpoint import Commit, fetch
from tercet.artifacts.decision import GateDecision
from tercet.errors import AlreadyExists, ChampionMoved, CorruptObject, ObjectNotFound
from tercet.storage import Storage, layout
from tercet.storage.base import sha256_of
from tercet.storage.documents import Document, seal, sha256, unseal

MAX_PROMOTION_ATTEMPTS = 10  # each of them gates the candidate against another champion


class Lineage(Document):
    """Where a model comes from."""

    run_id: str
    recipe_hash: str
    """`Config.experiment_hash()`."""
    dataset_versions: dict[str, str]
    """By name, of all datasets that it was trained on."""


class Version(Document):
    """A published model. It never changes; were its files to change, they would not be served."""

    once_unsealed: ClassVar[bool] = True

    name: str
    number: int
    commit: Commit
    """Of the folder `runs/<run_id>/best`."""
    lineage: Lineage
    decision: str | None
    """The key of the decision that it was published for; None where a person published it."""
    unix_seconds: float
    who: str
    nonce: str
    """Makes two documents of equal content different, so that a writer knows its own."""


class Promotion(NamedTuple):
    """How a candidate fared: what serves now, and the last decision; None where it had been the champion before."""

    champion: Champion | None
    decision: GateDecision | None


def register(storage: Storage, name: str, lineage: Lineage, who: str, decision: str | None = None) -> Version:
    """Publish the best model of a run as a version; where it was published before, that one is returned.

    Of several at once each gets a number of its own. Raises ObjectNotFound when the run has no best model."""
    commit = read_best(storage, lineage.run_id)
    if commit is None:
        raise ObjectNotFound(f"run {lineage.run_id} has no best model in {storage.uri}", hint="has it finished?")
    numbers = list_versions(storage, name)
    for found in versions_of(storage, name, lineage.run_id):
        if found.commit.files == commit.files:
            return found
    number, nonce = (numbers[-1] if numbers else 0) + 1, uuid.uuid4().hex
    while True:
        version = Version(
            name=name,
            number=number,
            commit=commit,
            lineage=lineage,
            decision=decision,
            unix_seconds=time.time(),
            who=who,
            nonce=nonce,
        )
        try:
            storage.put_if_absent(layout.model_version_key(name, number), seal(version))
        except AlreadyExists:
            if read_version(storage, name, number) != version:  # or it was this one, and the answer got lost
                number += 1
                continue
        return version


def promote(
    storage: Storage, name: str, lineage: Lineage, decide: Callable[[Champion | None], GateDecision], who: str
) -> Promotion:
    """Gate a run's best model against the champion, and put it in its place if it is better. Where another publisher
    moves the champion meanwhile, the candidate is gated again, against the new one.

    Every decision is kept in storage. Called again after a crash, it goes on. A run that was the champion once is not
    promoted again: somebody put another one in its place. Raises ChampionMoved when the champion does not come to rest.
    """
    for _ in range(MAX_PROMOTION_ATTEMPTS):
        present = read_champion(storage, name)
        published = {version.number for version in versions_of(storage, name, lineage.run_id)}
        if published and any(champion.version in published for champion in history(storage, name)):
            return Promotion(present, None)
        decision = decide(present)
        key = _keep(storage, name, decision)
        if decision.verdict != "promote":
            return Promotion(present, decision)
        version = register(storage, name, lineage, who, key)
        with contextlib.suppress(ChampionMoved):
            return Promotion(serve(storage, version, present, "gated", decision.sentence, who, key), decision)
    raise ChampionMoved(
        f"the champion of {name} moved {MAX_PROMOTION_ATTEMPTS} times while a candidate was compared with it",
        hint="several publishers are at work; publish again, nothing is lost",
    )


def serve(
    storage: Storage,
    version: Version,
    instead_of: Champion | None,
    kind: Kind,
    reason: str,
    who: str,
    decision: str | None = None,
) -> Champion:
    """Make a version the champion, whatever its merits. Raises ChampionMoved when `instead_of` is not the champion."""
    return move_champion(
        storage,
        instead_of,
        name=version.name,
        version=version.number,
        version_sha256=sha256(storage.read(layout.model_version_key(version.name, version.number))),
        kind=kind,
        reason=reason,
        who=who,
        decision=decision,
    )


def resolve(storage: Storage, name: str) -> tuple[Champion, Version]:
    """The champion, and the version that it is. Raises ObjectNotFound where there is none, CorruptObject where the
    version is not the one that was made the champion."""
    champion = read_champion(storage, name)
    if champion is None:
        known = ", ".join(list_models(storage)) or "none"
        raise ObjectNotFound(f"model {name} has no champion in {storage.uri}", hint=f"models there: {known}")
    return champion, version_of(storage, champion)


def version_of(storage: Storage, champion: Champion) -> Version:
    """Return the version that a champion is.

    Raises ObjectNotFound if the version is gone, CorruptObject if it is not the one that was made the champion."""
    key = layout.model_version_key(champion.name, champion.version)
    data = storage.read(key)
    if sha256(data) != champion.version_sha256:
        raise CorruptObject(
            f"{storage.uri_of(key)} is not what was made the champion",
            hint="roll back to another version: tercet models rollback",
        )
    return unseal(Version, data, storage.uri_of(key))


def download(storage: Storage, version: Version, folder: Path) -> Path:
    """Bring a version's files to a folder below `folder` and return its path, which `SentenceTransformer(path)` loads.

    It appears whole, each file verified by its sha256; what is there already is verified again, and not fetched.
    Several processes may ask at once. Raises CorruptObject or ObjectNotFound, and then leaves nothing."""
    target = folder / f"{version.name}-{version.number}-{version.nonce[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{target.name}.lock"):
        if not _is_whole(target, version.commit):
            coming = folder / f".{target.name}.coming"
            for left in (target, coming):  # damaged, or of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                fetch(storage, version.commit, coming).rename(target)
            finally:
                shutil.rmtree(coming, ignore_errors=True)
    return target


def read_version(storage: Storage, name: str, number: int) -> Version:
    """Raises ObjectNotFound, CorruptObject."""
    key = layout.model_version_key(name, number)
    try:
        return unseal(Version, storage.read(key), storage.uri_of(key))
    except ObjectNotFound:
        known = ", ".join(map(str, list_versions(storage, name)[-10:])) or "none"
        raise ObjectNotFound(
            f"model {name} has no version {number} in {storage.uri}", hint=f"versions there: {known}"
        ) from None


def read_decision(storage: Storage, key: str) -> GateDecision:
    """What `Champion.decision` or `Version.decision` names. Raises ObjectNotFound, CorruptObject."""
    return unseal(GateDecision, storage.read(key), storage.uri_of(key))


def list_models(storage: Storage) -> list[str]:
    """Models with a version, sorted."""
    return layout.model_names(storage.list(layout.MODELS))


def list_versions(storage: Storage, name: str) -> list[int]:
    """Numbers of a model's versions, the oldest first."""
    return layout.model_version_numbers(storage.list(layout.model_versions_prefix(name)), name)


def versions_of(storage: Storage, name: str, run_id: str) -> list[Version]:
    """What was published of a run, the newest first. Reads every version of the model."""
    versions = (read_version(storage, name, number) for number in reversed(list_versions(storage, name)))
    return [version for version in versions if version.lineage.run_id == run_id]


def _keep(storage: Storage, name: str, decision: GateDecision) -> str:
    data = seal(decision)
    key = layout.decision_key(name, sha256(data))
    with contextlib.suppress(AlreadyExists):  # of this very content
        storage.put_if_absent(key, data)
    return key


def _is_whole(folder: Path, commit: Commit) -> bool:
    return all(
        (folder / path).is_file() and sha256_of(folder / path) == record.sha256 for path, record in commit.files.items()
    )
