"""Writing and upload of checkpoints in the background."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, commit_step, upload_part
from tercet.artifacts.lease import Attempt
from tercet.artifacts.throughput import Throughput
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.layout import attempt_folder

Write = Callable[[], Mapping[str, str]]
"""Writes files of a checkpoint, and returns the sha256 of those whose hash it knows, by path in the folder."""


class Uploader:
    """Writes, uploads and commits checkpoints on a background thread of each rank, one checkpoint at a time.

    An error of that thread is raised by the next call, so no run finishes without its checkpoints."""

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        lineage: tuple[Attempt, ...],
        rank: int,
        confirm: Callable[[], None] = lambda: None,
        earlier: Throughput | None = None,
    ) -> None:
        """confirm: called before each upload; raises if another attempt has taken over the run. earlier: the throughput
        of the checkpoint that this attempt resumed from."""
        self._storage, self._run_id, self._lineage, self._rank = storage, run_id, lineage, rank
        self._confirm, self._earlier = confirm, earlier
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._writes: list[Write] = []
        self._written = threading.Event()
        """Whether no checkpoint waits to be written, so that the memory that it is written from is free."""
        self._written.set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-uploader", daemon=True)
        self._thread.start()

    def wait_until_written(self) -> None:
        """Wait until the files of the checkpoint before are written. Raises the error of the background thread."""
        self._written.wait()
        self._raise_error()

    def write_later(self, write: Write) -> None:
        """Have files of the checkpoint that is submitted next written on the background thread."""
        self._writes.append(write)

    def submit(
        self,
        local_dir: Path,
        step: int,
        epoch: float,
        metrics: dict[str, float],
        on_commit: Callable[[Commit], None],
        throughput: Throughput | None = None,
    ) -> None:
        """Queue a folder, which is deleted once uploaded. Blocks only while an earlier one has not begun to be written.

        `on_commit` is called on rank 0, on the background thread. throughput: what this rank counted in this attempt.
        Raises the error of an earlier upload."""
        self._raise_error()
        writes, self._writes = self._writes, []
        self._written.clear()

        def job() -> None:
            sha256s: dict[str, str] = {}
            for write in writes:
                sha256s.update(write())
            self._written.set()
            crash_point("after_write", step)
            folder = attempt_folder(self._run_id, step, self._lineage[-1].name)
            crash_point("before_upload", step)
            self._confirm()
            upload_part(self._storage, local_dir, folder, self._rank, throughput, sha256s)
            shutil.rmtree(local_dir)
            crash_point("before_commit", step)
            if self._rank == 0:
                commit = commit_step(
                    self._storage, self._run_id, step, epoch, metrics, self._lineage, earlier=self._earlier
                )
                crash_point("after_commit", step)
                on_commit(commit)

        self._jobs.put(job)

    def close(self) -> None:
        """Wait until everything is committed. Raises the error of an upload that failed."""
        self._jobs.put(None)
        self._thread.join()
        self._raise_error()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:  # noqa: BLE001 - raised again on the training thread
                    self._error = error
            if self._error is not None:
                self._written.set()  # nothing will be written any more

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
