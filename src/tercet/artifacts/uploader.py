"""Upload of checkpoints in the background."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, commit_step, upload_part
from tercet.artifacts.lease import Attempt
from tercet.artifacts.throughput import Throughput
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.layout import attempt_folder


class Uploader:
    """Uploads and commits checkpoints on a background thread of each rank, one checkpoint at a time.

    An error of an upload is raised by the next `submit` or by `close`, so no run finishes without its checkpoints."""

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
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-uploader", daemon=True)
        self._thread.start()

    def submit(
        self,
        local_dir: Path,
        step: int,
        epoch: float,
        metrics: dict[str, float],
        on_commit: Callable[[Commit], None],
        throughput: Throughput | None = None,
    ) -> None:
        """Queue a folder, which is deleted once uploaded. Blocks only while an earlier folder has not begun to upload.

        `on_commit` is called on rank 0, on the background thread. throughput: what this rank counted in this attempt.
        Raises the error of an earlier upload."""
        self._raise_error()

        def job() -> None:
            folder = attempt_folder(self._run_id, step, self._lineage[-1].name)
            crash_point("before_upload", step)
            self._confirm()
            upload_part(self._storage, local_dir, folder, self._rank, throughput)
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

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
