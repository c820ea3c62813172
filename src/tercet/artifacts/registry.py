"""Published models: numbered versions, what serving loads, and how a candidate becomes the champion.

A model's files stay in the folder of its run, `runs/<run_id>/best`. champion.py says which version serves.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from filelock import FileLock

from tercet.artifacts.best import read_best
from tercet.artifacts.champion import Champion, Kind, history, mark_served, move_champion, read_champion
from tercet.artifacts.checkpoint import Commit, fetch
from tercet.artifacts.decision import GateDecision
from tercet.errors import AlreadyExists, ChampionMoved, Conflict, CorruptObject, ObjectNotFound
from tercet.storage import Storage, layout
from tercet.storage.base import sha256_of
from tercet.storage.documents import Document, seal, sha256, unseal

logger = logging.getLogger("tercet")

MAX_PROMOTION_ATTEMPTS = 10  # each gates the candidate against another champion


class Lineage(Document):
    """Origin of a model."""

    run_id: str
    recipe_hash: str
    """`Config.experiment_hash()`."""
    dataset_versions: dict[str, str]
    """Version of each dataset that the model was trained on, by name."""


class Version(Document):
    """A published model. Immutable: if its files change, it is no longer served."""

    once_unsealed: ClassVar[bool] = True

    name: str
    number: int
    commit: Commit
    """Commit of the folder `runs/<run_id>/best`."""
    lineage: Lineage
    decision: str | None
    """Key of the decision to promote it; None if it was published by hand."""
    unix_seconds: float
    who: str
    nonce: str
    """Makes two documents with the same content different, so that a writer recognises its own."""


class Index(Document):
    """Its presence says that every version is indexed by its run, and every version that served has its mark."""

    newest_version: int
    """A hint: the number after it is free, unless another publisher was quicker."""


class VersionsOfRun(Document):
    """Numbers of the versions published from a run. One counts if that version exists and is of this run."""

    run_id: str
    numbers: tuple[int, ...] = ()


class Promotion(NamedTuple):
    """Outcome of a promotion."""

    champion: Champion | None
    """The one that serves now."""
    decision: GateDecision | None
    """The last decision; None if the candidate had been the champion before."""


def register(storage: Storage, name: str, lineage: Lineage, who: str, decision: str | None = None) -> Version:
    """Publish the best model of a run as a version, or return the version if it was published before.

    Of several publishers at once, each gets a number of its own. Raises ObjectNotFound if the run has no best model."""
    commit = read_best(storage, lineage.run_id)
    if commit is None:
        raise ObjectNotFound(
            f"run {lineage.run_id} has no best model in {storage.uri}", hint="check that the run has finished"
        )
    index = _index(storage, name)
    for version in _published_versions(storage, name, lineage.run_id, index):
        if version.commit.files == commit.files:
            return version
    newest = index.newest_version if index is not None else max(list_versions(storage, name), default=0)
    number, nonce = newest + 1, uuid.uuid4().hex
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
        # Before the version, so that none is missing from the index. A reader checks that the version is of this run.
        _index_version(storage, version)
        try:
            storage.put_if_absent(layout.model_version_key(name, number), seal(version))
        except AlreadyExists:
            if read_version(storage, name, number) != version:  # else this write succeeded, and only its reply was lost
                number += 1
                continue
        if index is not None:
            storage.put(layout.index_key(name), seal(Index(newest_version=number)))
        return version


def promote(
    storage: Storage, name: str, lineage: Lineage, decide: Callable[[Champion | None], GateDecision], who: str
) -> Promotion:
    """Gate a run's best model against the champion, and make it the champion if it is better. If another publisher
    moves the champion meanwhile, gate the candidate again, against the new one.

    Every decision is stored. Called again after a crash, this resumes. A run whose model was the champion before is not
    promoted again, because someone replaced it on purpose. The number of storage requests does not depend on the number
    of versions or champions. Raises ChampionMoved if the champion moves at every attempt."""
    for _ in range(MAX_PROMOTION_ATTEMPTS):
        present = read_champion(storage, name)
        published = versions_of(storage, name, lineage.run_id)
        if any(_was_champion(storage, present, version) for version in published):
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
    """Make a version the champion without gating it. Raises ChampionMoved if `instead_of` is not the champion."""
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
    """Return the champion and its version.

    Raises ObjectNotFound if there is no champion, CorruptObject if the version is not the one that was promoted."""
    champion = read_champion(storage, name)
    if champion is None:
        known = ", ".join(list_models(storage)) or "none"
        raise ObjectNotFound(f"model {name} has no champion in {storage.uri}", hint=f"models there: {known}")
    return champion, version_of(storage, champion)


def version_of(storage: Storage, champion: Champion) -> Version:
    """Return the version of a champion.

    Raises ObjectNotFound if the version is gone, CorruptObject if it is not the one that was promoted."""
    key = layout.model_version_key(champion.name, champion.version)
    data = storage.read(key)
    if sha256(data) != champion.version_sha256:
        raise CorruptObject(
            f"{storage.uri_of(key)} is not the version that was promoted",
            hint="roll back to another version: tercet models rollback",
        )
    return unseal(Version, data, storage.uri_of(key))


def download(storage: Storage, version: Version, folder: Path) -> Path:
    """Download a version to a folder below `folder` and return its path, which `SentenceTransformer(path)` loads.

    The folder appears whole, each file verified by its sha256. If it is there already, it is verified again and kept.
    Several processes may call this at once. Raises CorruptObject or ObjectNotFound, and then leaves no folder."""
    target = folder / f"{version.name}-{version.number}-{version.nonce[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{target.name}.lock"):
        if not _is_whole(target, version.commit):
            coming = folder / f".{target.name}.coming"
            for left in (target, coming):  # damaged, or left by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                fetch(storage, version.commit, coming).rename(target)
            finally:
                shutil.rmtree(coming, ignore_errors=True)
    return target


def read_version(storage: Storage, name: str, number: int) -> Version:
    """Return a version. Raises ObjectNotFound, which names the newest versions; CorruptObject."""
    key = layout.model_version_key(name, number)
    try:
        return unseal(Version, storage.read(key), storage.uri_of(key))
    except ObjectNotFound:
        known = ", ".join(map(str, list_versions(storage, name)[-10:])) or "none"
        raise ObjectNotFound(
            f"model {name} has no version {number} in {storage.uri}", hint=f"versions there: {known}"
        ) from None


def read_decision(storage: Storage, key: str) -> GateDecision:
    """Return the decision with a key from `Champion` or `Version`. Raises ObjectNotFound, CorruptObject."""
    return unseal(GateDecision, storage.read(key), storage.uri_of(key))


def list_models(storage: Storage) -> list[str]:
    """Return the names of the models that have a version, sorted."""
    return layout.model_names(storage.list(layout.MODELS))


def list_versions(storage: Storage, name: str) -> list[int]:
    """Return the numbers of a model's versions, the oldest first."""
    return layout.model_version_numbers(storage.list(layout.model_versions_prefix(name)), name)


def versions_of(storage: Storage, name: str, run_id: str) -> list[Version]:
    """Return the versions that were published from a run, the newest first. Raises CorruptObject."""
    return _published_versions(storage, name, run_id, _index(storage, name))


def _published_versions(storage: Storage, name: str, run_id: str, index: Index | None) -> list[Version]:
    if index is not None:
        numbers = list(_versions_of_run(storage, name, run_id)[0].numbers)
    else:
        numbers = list_versions(storage, name)
    versions = []
    for number in sorted(numbers, reverse=True):
        key = layout.model_version_key(name, number)
        with contextlib.suppress(ObjectNotFound):  # its publisher died, or another one took the number
            versions.append(unseal(Version, storage.read(key), storage.uri_of(key)))
    return [version for version in versions if version.lineage.run_id == run_id]


def _index(storage: Storage, name: str) -> Index | None:
    """Return the index. If it is missing, an older tercet published the versions: make it first.

    None if the chain of champions is broken: then no index can say which versions have been the champion."""
    key = layout.index_key(name)
    with contextlib.suppress(ObjectNotFound, CorruptObject):
        return unseal(Index, storage.read(key), storage.uri_of(key))
    numbers = list_versions(storage, name)
    for number in numbers:
        _index_version(storage, read_version(storage, name, number))
    try:
        champions = history(storage, name)
    except CorruptObject as error:
        logger.warning("every version of %s is read, because its index cannot be made: %s", name, error)
        return None
    for champion in reversed(champions):  # the oldest first: a mark is written once
        mark_served(storage, champion)
    index = Index(newest_version=max(numbers, default=0))
    storage.put(key, seal(index))
    return index


def _index_version(storage: Storage, version: Version) -> None:
    run_id = version.lineage.run_id
    while True:
        indexed, token = _versions_of_run(storage, version.name, run_id)
        if version.number in indexed.numbers:
            return
        changed = VersionsOfRun(run_id=run_id, numbers=(*indexed.numbers, version.number))
        with contextlib.suppress(Conflict):  # another publisher of this run was quicker: read again
            storage.compare_and_swap(layout.versions_of_run_key(version.name, run_id), seal(changed), token)
            return


def _versions_of_run(storage: Storage, name: str, run_id: str) -> tuple[VersionsOfRun, str | None]:
    key = layout.versions_of_run_key(name, run_id)
    try:
        data, token = storage.read_versioned(key)
    except ObjectNotFound:
        return VersionsOfRun(run_id=run_id), None
    uri = storage.uri_of(key)
    hint = f"Delete it and {storage.uri_of(layout.index_key(name))}: the next promotion writes both again."
    versions = unseal(VersionsOfRun, data, uri, hint)
    if versions.run_id != run_id:
        raise CorruptObject(f"{uri} names the versions of run {versions.run_id}", hint)
    return versions, token


def _was_champion(storage: Storage, present: Champion | None, version: Version) -> bool:
    """Whether a version is the present champion, or was one. The mark of the present champion may still be missing."""
    if present is None:
        return False
    if present.version == version.number:
        return True
    if _index(storage, version.name) is None:
        return any(champion.version == version.number for champion in history(storage, version.name))
    return storage.exists(layout.served_key(version.name, version.number))


def _keep(storage: Storage, name: str, decision: GateDecision) -> str:
    data = seal(decision)
    key = layout.decision_key(name, sha256(data))
    with contextlib.suppress(AlreadyExists):  # with the same content
        storage.put_if_absent(key, data)
    return key


def _is_whole(folder: Path, commit: Commit) -> bool:
    return all(
        (folder / path).is_file() and sha256_of(folder / path) == record.sha256 for path, record in commit.files.items()
    )
