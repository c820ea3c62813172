"""What a checkpoint is, and when it counts.

    runs/<run_id>/checkpoints/<step>/<attempt>/…            files, each written by the rank that owns it
    runs/<run_id>/checkpoints/<step>/<attempt>/rank-0.json  what rank 0 wrote, with sha256: its part
    runs/<run_id>/checkpoints/<step>/COMMIT                 written last, put-if-absent: now it exists

Every attempt (a start of the worker group) writes to a folder of its own, so a late upload of a dead attempt can never
mix with another's. Without COMMIT there is no checkpoint, whatever lies there.
"""

from __future__ import annotations

import json
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tercet.errors import AlreadyExists, CorruptObject, ObjectNotFound, StorageUnavailable
from tercet.storage import Storage, sha256_of

logger = logging.getLogger(__name__)

COMMIT = "COMMIT"
PART_WAIT_SECONDS = 600.0

# What the trainer needs to go on, and who loads the model does not.
TRAINER_STATE_FILES = (
    "optimizer-",
    "scheduler.pt",
    "scaler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state",
    "trained_weights.safetensors",
)


class FileRecord(BaseModel):
    """One file of a commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    num_bytes: int


class Commit(BaseModel):
    """The document that makes a folder count. `files` maps paths below `folder` (a key in storage) to their records."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    epoch: float
    world_size: int
    attempt: str
    folder: str
    metrics: dict[str, float]
    files: dict[str, FileRecord]

    def model_files(self) -> dict[str, FileRecord]:
        """Only what `SentenceTransformer(folder)` loads."""
        return {path: record for path, record in self.files.items() if not path.startswith(TRAINER_STATE_FILES)}


def checkpoints_prefix(run_id: str) -> str:
    """Where a run's checkpoints lie."""
    return f"runs/{run_id}/checkpoints"


def _step_prefix(run_id: str, step: int) -> str:
    return f"{checkpoints_prefix(run_id)}/{step:08d}"


def attempt_folder(run_id: str, step: int, attempt: str) -> str:
    """The key of the folder into which one attempt writes one step's files."""
    return f"{_step_prefix(run_id, step)}/{attempt}"


def upload_part(storage: Storage, local_dir: Path, folder: str, rank: int) -> dict[str, FileRecord]:
    """Upload every file below `local_dir`, then this rank's part document."""
    records = upload_files(storage, local_dir, folder)
    part = {path: record.model_dump() for path, record in records.items()}
    storage.put(f"{folder}/rank-{rank}.json", json.dumps(part, sort_keys=True).encode())
    return records


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
    attempt: str,
    world_size: int,
    wait_seconds: float = PART_WAIT_SECONDS,
) -> Commit:
    """Called by rank 0: wait for every rank's part, then write COMMIT.

    When another attempt committed this step before, its commit stands and is returned, unless it is damaged: then it is
    replaced, or no later attempt could ever get past it. Raises StorageUnavailable when a part does not come."""
    folder = attempt_folder(run_id, step, attempt)
    files: dict[str, FileRecord] = {}
    deadline = time.monotonic() + wait_seconds
    for rank in range(world_size):
        for path, record in _wait_for_part(storage, f"{folder}/rank-{rank}.json", deadline).items():
            files[path] = FileRecord.model_validate(record)
    commit = Commit(
        step=step, epoch=epoch, world_size=world_size, attempt=attempt, folder=folder, metrics=metrics, files=files
    )
    key = f"{_step_prefix(run_id, step)}/{COMMIT}"
    try:
        storage.put_if_absent(key, commit.model_dump_json(indent=1).encode())
    except AlreadyExists:
        if (standing := _whole_commit(storage, key)) is not None:
            logger.warning("step %d was committed by another attempt; its commit stands", step)
            return standing
        logger.error("step %d was committed by another attempt, but is damaged; it is replaced", step)
        storage.put(key, commit.model_dump_json(indent=1).encode())
    return commit


def _whole_commit(storage: Storage, key: str) -> Commit | None:
    """The commit at `key` if all of its files are whole. Reads them all: two attempts seldom commit the same step."""
    try:
        commit = Commit.model_validate_json(storage.read(key))
        with tempfile.TemporaryDirectory(prefix="tercet-verify-") as folder:
            fetch(storage, commit, Path(folder))
    except (ValueError, CorruptObject, ObjectNotFound):
        return None
    return commit


def _wait_for_part(storage: Storage, key: str, deadline: float) -> dict[str, object]:
    pause_seconds = 0.05
    while True:
        try:
            part: dict[str, object] = json.loads(storage.read(key))
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
    """Every committed checkpoint of a run, newest first. A damaged COMMIT is skipped with a warning."""
    commits = []
    for key in storage.list(checkpoints_prefix(run_id)):
        if key.rsplit("/", 1)[-1] == COMMIT:
            try:
                commits.append(Commit.model_validate_json(storage.read(key)))
            except (ValueError, CorruptObject):
                logger.warning("%s: damaged; this checkpoint is skipped", storage.uri_of(key))
    return sorted(commits, key=lambda commit: commit.step, reverse=True)


def fetch(storage: Storage, commit: Commit, local_dir: Path, paths: Iterable[str] | None = None) -> Path:
    """Download the files of a commit (or only `paths`), each verified. Raises CorruptObject or ObjectNotFound."""
    for path in commit.files if paths is None else paths:
        storage.download(f"{commit.folder}/{path}", local_dir / path, sha256=commit.files[path].sha256)
    return local_dir


def fetch_newest(storage: Storage, run_id: str, local_dir: Path) -> Commit | None:
    """Download the newest checkpoint that is whole; a damaged one is skipped, loudly, for the one before."""
    for commit in read_commits(storage, run_id):
        try:
            fetch(storage, commit, local_dir)
        except (CorruptObject, ObjectNotFound) as error:
            logger.error("checkpoint of step %d is damaged and skipped for the one before: %s", commit.step, error)
            shutil.rmtree(local_dir, ignore_errors=True)
        else:
            return commit
    return None


def best_commit(commits: Iterable[Commit], metric: str) -> Commit | None:
    """The commit with the highest metric; the earlier one of equals."""
    return max((c for c in commits if metric in c.metrics), key=lambda c: (c.metrics[metric], -c.step), default=None)


class Uploader:
    """Uploads and commits off the training path: one background thread on each rank, one checkpoint at a time.

    A failed upload is raised at the next `submit` or at `close`, so a run cannot end well without its checkpoints."""

    def __init__(self, storage: Storage, run_id: str, attempt: str, rank: int, world_size: int) -> None:
        self._storage, self._run_id, self._attempt = storage, run_id, attempt
        self._rank, self._world_size = rank, world_size
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-uploader", daemon=True)
        self._thread.start()

    def submit(
        self, local_dir: Path, step: int, epoch: float, metrics: dict[str, float], on_commit: Callable[[Commit], None]
    ) -> None:
        """Queue a folder; it is deleted once uploaded. Blocks only while an earlier upload is still waiting."""
        self._raise_error()

        def job() -> None:
            folder = attempt_folder(self._run_id, step, self._attempt)
            upload_part(self._storage, local_dir, folder, self._rank)
            shutil.rmtree(local_dir)
            if self._rank == 0:
                on_commit(
                    commit_step(self._storage, self._run_id, step, epoch, metrics, self._attempt, self._world_size)
                )

        self._jobs.put(job)

    def close(self) -> None:
        """Wait until everything is committed. Raises what went wrong in the background."""
        self._jobs.put(None)
        self._thread.join()
        self._raise_error()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:  # noqa: BLE001 - carried to the training thread
                    self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def best_prefix(run_id: str) -> str:
    """Where a run's servable model lies: a folder that `SentenceTransformer(path)` loads."""
    return f"runs/{run_id}/best"


def publish_best(storage: Storage, run_id: str, commit: Commit, card: str) -> Commit:
    """Copy the model of a committed checkpoint to `best/`, verified on the way, with `card` as its README.md.

    Returns the commit of `best/`. Already there: nothing is done."""
    folder = best_prefix(run_id)
    if (done := read_best(storage, run_id)) is not None and (done.step, done.attempt) == (commit.step, commit.attempt):
        return done
    storage.delete(folder)
    with tempfile.TemporaryDirectory(prefix="tercet-best-") as local:
        fetch(storage, commit, Path(local), commit.model_files())
        (Path(local) / "README.md").write_text(card, encoding="utf-8")
        best = commit.model_copy(update={"folder": folder, "files": upload_files(storage, Path(local), folder)})
    storage.put(f"{folder}/{COMMIT}", best.model_dump_json(indent=1).encode())
    return best


def read_best(storage: Storage, run_id: str) -> Commit | None:
    """The commit of `best/`, or None while there is none. A damaged one is none: publishing again replaces it."""
    try:
        return Commit.model_validate_json(storage.read(f"{best_prefix(run_id)}/{COMMIT}"))
    except (ObjectNotFound, CorruptObject, ValueError):
        return None
