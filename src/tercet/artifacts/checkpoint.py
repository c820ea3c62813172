"""What a checkpoint is, and when it counts.

Every attempt (a start of the worker group) writes to a folder of its own, so a late upload of a dead attempt can never
mix with another's. Without COMMIT there is no checkpoint, whatever lies there. Every file is checked by its hash in
COMMIT, and COMMIT by its own (sealed.py) and by where it lies.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tercet.artifacts.lease import Attempt, is_fenced, read_attempts
from tercet.errors import Conflict, CorruptObject, ObjectNotFound, StorageError, StorageUnavailable
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.base import sha256_of
from tercet.storage.documents import Document, Frozen, seal, unseal
from tercet.storage.layout import COMMIT, attempt_folder, checkpoints_prefix, commit_key, part_key, step_of

logger = logging.getLogger(__name__)

PART_WAIT_SECONDS = 600.0

# What the trainer needs to go on, and who loads the model does not.
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
    """What one rank uploaded to `folder`."""

    folder: str
    rank: int
    files: dict[str, FileRecord]


class Commit(Document):
    """The document that makes a folder count. `files` maps paths below `folder` (a key in storage) to their records.

    `lineage` is of the attempts that the checkpoint goes back to, the one that wrote it last. `metrics` are of this
    very step; without an evaluation there are none."""

    step: int
    epoch: float
    lineage: tuple[Attempt, ...]
    folder: str
    metrics: dict[str, float]
    files: dict[str, FileRecord]

    @property
    def attempt(self) -> Attempt:
        """That wrote it."""
        return self.lineage[-1]

    def model_files(self) -> dict[str, FileRecord]:
        """Only what `SentenceTransformer(folder)` loads."""
        return {path: record for path, record in self.files.items() if not path.startswith(TRAINER_STATE_FILES)}


def upload_part(storage: Storage, local_dir: Path, folder: str, rank: int) -> None:
    """Upload every file below `local_dir`, then this rank's part document."""
    records = upload_files(storage, local_dir, folder)
    crash_point("mid_upload", int(folder.split("/")[-2]))
    storage.put(part_key(folder, rank), seal(Part(folder=folder, rank=rank, files=records)))


def upload_files(storage: Storage, local_dir: Path, folder: str) -> dict[str, FileRecord]:
    """Upload every file below `local_dir` to `folder`; returns their records."""
    records = {}
    for path in sorted(path for path in local_dir.rglob("*") if path.is_file()):
        name = path.relative_to(local_dir).as_posix()
        records[name] = FileRecord(sha256=sha256_of(path), num_bytes=path.stat().st_size)
        storage.upload(path, f"{folder}/{name}")
    return records


def commit_step(
    storage: Storage,
    run_id: str,
    step: int,
    epoch: float,
    metrics: dict[str, float],
    lineage: tuple[Attempt, ...],
    wait_seconds: float = PART_WAIT_SECONDS,
) -> Commit:
    """Called by rank 0: wait for every rank's part, then write COMMIT. The last of `lineage` is the attempt itself.

    When another attempt committed this step before, its commit stands and is returned, unless it is damaged, or came
    too late to count: then it is replaced, or no later attempt could ever get past it. Raises StorageUnavailable when a
    part does not come, CorruptObject when one is damaged."""
    folder = attempt_folder(run_id, step, lineage[-1].name)
    files: dict[str, FileRecord] = {}
    deadline = time.monotonic() + wait_seconds
    for rank in range(lineage[-1].world_size):
        files.update(_wait_for_part(storage, folder, rank, deadline).files)
    commit = Commit(step=step, epoch=epoch, lineage=lineage, folder=folder, metrics=metrics, files=files)
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
    """The token of what lies at `key`, and the commit that it is, if that and all of its files are whole. Reads them
    all: two attempts seldom commit the same step."""
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
    """What is wrong with the files of a commit, or some of them, if anything is. Reads them all."""
    try:
        with tempfile.TemporaryDirectory(prefix="tercet-verify-") as folder:
            fetch(storage, commit, Path(folder), paths)
    except (CorruptObject, ObjectNotFound) as error:
        return error
    return None


def read_commit(storage: Storage, key: str) -> Commit:
    """Raises ObjectNotFound, CorruptObject: also for a document that is whole, but of another checkpoint."""
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
                    hint="a worker died or its upload hangs; see its log",
                ) from None
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, 1.0)


def read_commits(storage: Storage, run_id: str) -> list[Commit]:
    """Every committed checkpoint of a run that counts, newest first. A damaged COMMIT is skipped with a warning, and so
    is one that an attempt wrote after another had taken over (see lease.py).

    Commits name attempts too: where the lease got lost, what came too late still does not count."""
    attempts, found = set(read_attempts(storage, run_id)), _listed_commits(storage, run_id)
    attempts.update(attempt for commit in found for attempt in commit.lineage)
    for commit in (late := [commit for commit in found if is_fenced(commit.attempt, commit.step, attempts)]):
        logger.warning("%s: of an attempt that had lost the run; it is skipped", storage.uri_of(commit.folder))
    return sorted((c for c in found if c not in late), key=lambda commit: commit.step, reverse=True)


def _listed_commits(storage: Storage, run_id: str, num_tries: int = 10) -> list[Commit]:
    """Lists again where one is gone before it is read: a worker has pruned it, and committed a newer one before."""
    found = []
    for key in storage.list(checkpoints_prefix(run_id)):
        if key.rsplit("/", 1)[-1] == COMMIT:
            try:
                found.append(read_commit(storage, key))
            except CorruptObject as error:
                logger.warning("%s: damaged; this checkpoint is skipped: %s", storage.uri_of(key), error)
            except ObjectNotFound:
                if num_tries == 1:
                    raise
                return _listed_commits(storage, run_id, num_tries - 1)
    return found


def fetch(storage: Storage, commit: Commit, local_dir: Path, paths: Iterable[str] | None = None) -> Path:
    """Download the files of a commit (or only `paths`), each verified. Raises CorruptObject or ObjectNotFound."""
    for path in commit.files if paths is None else paths:
        storage.download(f"{commit.folder}/{path}", local_dir / path, sha256=commit.files[path].sha256)
    return local_dir


def fetch_newest(
    storage: Storage, run_id: str, local_dir: Path, on_skip: Callable[[int, StorageError], None] = lambda *_: None
) -> Commit | None:
    """Download the newest checkpoint that is whole; a damaged one is skipped, loudly, for the one before. `on_skip`
    gets the step of each damaged one, and what is wrong with it."""
    commits = read_commits(storage, run_id)
    newest_step = commits[0].step if commits else 0
    steps = {step_of(key) or 0 for key in storage.list(checkpoints_prefix(run_id))}
    for step in sorted(step for step in steps if step > newest_step):
        logger.warning("step %d has files but no commit that counts: it was not finished, or lost it", step)
    for commit in commits:
        try:
            fetch(storage, commit, local_dir)
        except (CorruptObject, ObjectNotFound) as error:
            if not storage.exists(commit_key(run_id, commit.step)):
                # An attempt that does not know yet that it lost the run has pruned it, after it committed newer ones.
                shutil.rmtree(local_dir, ignore_errors=True)
                return fetch_newest(storage, run_id, local_dir, on_skip)
            logger.error("checkpoint of step %d is damaged and skipped for the one before: %s", commit.step, error)
            on_skip(commit.step, error)
            shutil.rmtree(local_dir, ignore_errors=True)
        else:
            return commit
    return None
