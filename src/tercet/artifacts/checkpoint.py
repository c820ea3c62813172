"""Checkpoints: files of every rank, and the commit that makes them count.

Every attempt (a start of the worker group) writes to a folder of its own, so late uploads of a dead attempt never mix
with those of another. Without COMMIT there is no checkpoint, whatever files exist. Every file is checked against its
hash in COMMIT, and COMMIT against its own hash (documents.py) and its key.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from tercet.artifacts.lease import Attempt, is_fenced, read_attempts
from tercet.artifacts.throughput import Throughput, of_all_ranks
from tercet.errors import Conflict, CorruptObject, ObjectNotFound, StorageError, StorageUnavailable
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.base import sha256_of
from tercet.storage.documents import Document, Frozen, seal, unseal
from tercet.storage.layout import attempt_folder, checkpoints_prefix, commit_key, is_commit, part_key, step_of

logger = logging.getLogger("tercet")

PART_WAIT_SECONDS = 600.0

# Files that the trainer needs to resume, and that nobody needs to load the model.
TRAINER_STATE_FILES = (
    "ledger-",
    "optimizer-",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state",
    "trained_weights.safetensors",
)


class FileRecord(Frozen):
    """One file of a commit."""

    sha256: str
    num_bytes: int


class Part(Document):
    """The files that one rank uploaded to `folder`."""

    folder: str
    rank: int
    files: dict[str, FileRecord]
    throughput: Throughput | None = None
    """What this rank counted in this attempt, up to the checkpoint."""


class Commit(Document):
    """The document that makes a folder count. `files` maps paths below `folder` (a key in storage) to their records.

    `lineage` names the attempts that trained up to this checkpoint, its writer last. `metrics` are those of exactly
    this step, empty if it was not evaluated."""

    step: int
    epoch: float
    lineage: tuple[Attempt, ...]
    folder: str
    metrics: dict[str, float]
    files: dict[str, FileRecord]
    throughput: Throughput | None = None
    """Of all ranks, in all attempts of the lineage, up to this step."""

    @property
    def attempt(self) -> Attempt:
        """The attempt that wrote this checkpoint."""
        return self.lineage[-1]

    def model_files(self) -> dict[str, FileRecord]:
        """Return the files that `SentenceTransformer(folder)` loads."""
        return {path: record for path, record in self.files.items() if not path.startswith(TRAINER_STATE_FILES)}


def upload_part(
    storage: Storage,
    local_dir: Path,
    folder: str,
    rank: int,
    throughput: Throughput | None = None,
    sha256s: Mapping[str, str] | None = None,
) -> None:
    """Move every file below `local_dir` to storage, then write the document that lists them.

    sha256s: of files whose hash is known already, by path below `local_dir`."""
    records = upload_files(storage, local_dir, folder, sha256s or {}, move=True)
    crash_point("mid_upload", step_of(folder))
    storage.put(part_key(folder, rank), seal(Part(folder=folder, rank=rank, files=records, throughput=throughput)))


def upload_files(
    storage: Storage,
    local_dir: Path,
    folder: str,
    sha256s: Mapping[str, str] = MappingProxyType({}),
    move: bool = False,
) -> dict[str, FileRecord]:
    """Upload every file below `local_dir` to `folder` and return their records by relative path.

    sha256s: of files whose hash is known already. move: nothing else needs the files, which may be gone afterwards."""
    records = {}
    for path in sorted(path for path in local_dir.rglob("*") if path.is_file()):
        name = path.relative_to(local_dir).as_posix()
        records[name] = FileRecord(sha256=sha256s.get(name) or sha256_of(path), num_bytes=path.stat().st_size)
        storage.upload(path, f"{folder}/{name}", move=move)
    return records


def commit_step(
    storage: Storage,
    run_id: str,
    step: int,
    epoch: float,
    metrics: dict[str, float],
    lineage: tuple[Attempt, ...],
    wait_seconds: float = PART_WAIT_SECONDS,
    earlier: Throughput | None = None,
) -> Commit:
    """Wait for every rank's part, then write COMMIT; only rank 0 calls this. The last of `lineage` is this attempt.

    earlier: the throughput of the checkpoint that this attempt resumed from.
    If another attempt committed this step before, its commit stands and is returned. If that commit is damaged or came
    too late to count, it is replaced, or no later attempt could ever get past it. Raises StorageUnavailable if a part
    does not appear within `wait_seconds`, CorruptObject if one is damaged."""
    folder = attempt_folder(run_id, step, lineage[-1].name)
    deadline = time.monotonic() + wait_seconds
    parts = [_wait_for_part(storage, folder, rank, deadline) for rank in range(lineage[-1].world_size)]
    files = {name: record for part in parts for name, record in part.files.items()}
    readings = [part.throughput for part in parts if part.throughput is not None]
    throughput = (earlier or Throughput()).then(of_all_ranks(readings)) if len(readings) == len(parts) else None
    commit = Commit(
        step=step, epoch=epoch, lineage=lineage, folder=folder, metrics=metrics, files=files, throughput=throughput
    )
    key = commit_key(run_id, step)
    token: str | None = None
    while True:
        try:
            storage.compare_and_swap(key, seal(commit), token)
            return commit
        except Conflict:
            token, standing = _standing(storage, key)
        if standing is not None and not is_fenced(standing.attempt, step, read_attempts(storage, run_id)):
            logger.warning("step %d was committed by another attempt; its commit stands", step)
            return standing
        state = "is damaged" if standing is None else "came too late"
        logger.error("step %d was committed by another attempt, but that %s; it is replaced", step, state)


def _standing(storage: Storage, key: str) -> tuple[str | None, Commit | None]:
    """Return the token of the object at `key`, and its commit if that and all of its files are whole. Reads all files:
    two attempts seldom commit the same step."""
    token = None
    try:
        data, token = storage.read_versioned(key)
        commit = _commit_of(storage, key, data)
    except ObjectNotFound:
        return None, None
    except CorruptObject as error:
        return token or error.token, None
    return token, commit if damage_of(storage, commit) is None else None


def damage_of(storage: Storage, commit: Commit, paths: Iterable[str] | None = None) -> StorageError | None:
    """Return what is wrong with the files of a commit (or only `paths`), or None. Reads them all."""
    try:
        with tempfile.TemporaryDirectory(prefix="tercet-verify-") as folder:
            fetch(storage, commit, Path(folder), paths)
    except (CorruptObject, ObjectNotFound) as error:
        return error
    return None


def read_commit(storage: Storage, key: str) -> Commit:
    """Return a commit. Raises ObjectNotFound; CorruptObject also for the whole commit of another checkpoint."""
    return _commit_of(storage, key, storage.read(key))


def _commit_of(storage: Storage, key: str, data: bytes) -> Commit:
    commit = unseal(Commit, data, storage.uri_of(key))
    if not f"{commit.folder}/".startswith(f"{key.rpartition('/')[0]}/"):
        raise CorruptObject(f"{storage.uri_of(key)} is the commit of {commit.folder}")
    return commit


def _wait_for_part(storage: Storage, folder: str, rank: int, deadline: float) -> Part:
    key = part_key(folder, rank)
    pause_seconds = 0.05
    while True:
        try:
            part = unseal(Part, storage.read(key), storage.uri_of(key))
            if (part.folder, part.rank) != (folder, rank):
                raise CorruptObject(f"{storage.uri_of(key)} is the part of rank {part.rank} in {part.folder}")
            return part
        except ObjectNotFound:
            if time.monotonic() > deadline:
                raise StorageUnavailable(
                    f"{storage.uri_of(key)}: did not appear in time, so the checkpoint is not committed",
                    hint="A worker died or its upload hangs: see its log.",
                ) from None
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 1.0)


def read_commits(storage: Storage, run_id: str) -> list[Commit]:
    """Return every committed checkpoint of a run that counts, the newest first. A damaged COMMIT is skipped with a
    warning, and so is one that an attempt wrote after another had taken over (see lease.py).

    Commits name attempts too, so even if the lease document was deleted, late commits do not count."""
    attempts, commits = set(read_attempts(storage, run_id)), _listed_commits(storage, run_id)
    attempts.update(attempt for commit in commits for attempt in commit.lineage)
    for commit in (late := [commit for commit in commits if is_fenced(commit.attempt, commit.step, attempts)]):
        logger.warning(
            "%s: its attempt had lost the run when it committed; it is skipped", storage.uri_of(commit.folder)
        )
    return sorted((c for c in commits if c not in late), key=lambda commit: commit.step, reverse=True)


def _listed_commits(storage: Storage, run_id: str, num_tries: int = 10) -> list[Commit]:
    """Return all whole commits. If one is gone before it is read, list again: a worker deleted it after a newer one."""
    commits = []
    for key in storage.list(checkpoints_prefix(run_id)):
        if is_commit(key):
            try:
                commits.append(read_commit(storage, key))
            except CorruptObject as error:
                logger.warning("%s: damaged; this checkpoint is skipped: %s", storage.uri_of(key), error)
            except ObjectNotFound:
                if num_tries == 1:
                    raise
                return _listed_commits(storage, run_id, num_tries - 1)
    return commits


def fetch(storage: Storage, commit: Commit, local_dir: Path, paths: Iterable[str] | None = None) -> Path:
    """Download the files of a commit (or only `paths`) and verify each. Raises CorruptObject or ObjectNotFound."""
    for path in commit.files if paths is None else paths:
        storage.download(f"{commit.folder}/{path}", local_dir / path, sha256=commit.files[path].sha256)
    return local_dir


def fetch_newest(
    storage: Storage, run_id: str, local_dir: Path, on_skip: Callable[[int, StorageError], None] = lambda *_: None
) -> Commit | None:
    """Download the newest whole checkpoint and return its commit, or None. A damaged one is skipped, with an error in
    the log. `on_skip` is called with the step of each damaged one, and what is wrong with it."""
    commits = read_commits(storage, run_id)
    newest_step = commits[0].step if commits else 0
    steps = {step_of(key) or 0 for key in storage.list(checkpoints_prefix(run_id))}
    for step in sorted(step for step in steps if step > newest_step):
        logger.warning("step %d has files but no commit that counts: it was not finished, or its COMMIT is lost", step)
    for commit in commits:
        try:
            fetch(storage, commit, local_dir)
        except (CorruptObject, ObjectNotFound) as error:
            if not storage.exists(commit_key(run_id, commit.step)):
                # Deleted by an attempt that does not know yet that it lost the run, after it committed newer ones.
                shutil.rmtree(local_dir, ignore_errors=True)
                return fetch_newest(storage, run_id, local_dir, on_skip)
            logger.error("checkpoint of step %d is damaged and skipped; the one before is used: %s", commit.step, error)
            on_skip(commit.step, error)
            shutil.rmtree(local_dir, ignore_errors=True)
        else:
            return commit
    return None
