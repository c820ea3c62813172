"""One attempt at a run, which all ranks make together and rank 0 holds the lease for."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, fetch, fetch_newest
from tercet.artifacts.journal import end_name, record_end, report_incident
from tercet.artifacts.lease import Attempt, Lease, hold_lease
from tercet.errors import StorageError
from tercet.model.collectives import run_on_rank_0
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage


@dataclass(frozen=True)
class HeldRun:
    """What a rank knows of the attempt that it is part of."""

    storage: Storage
    run_id: str
    attempt: Attempt
    commit: Commit | None
    """The checkpoint that the attempt resumes from; None at the beginning."""
    resume_dir: Path | None
    """The verified files of that checkpoint, on this machine."""
    lease: Lease | None
    """Held by rank 0; None on the others."""

    @property
    def lineage(self) -> tuple[Attempt, ...]:
        """Every attempt that this one builds on, oldest first, and itself."""
        return (*(self.commit.lineage if self.commit else ()), self.attempt)

    def confirm(self) -> None:
        """Ask storage, on rank 0, whether the run is still held. Raises LeaseLost, StorageError."""
        if self.lease is not None:
            self.lease.confirm()

    def report_hang(self, rank: int, seconds: float) -> None:
        """Record that this attempt ends because a rank made no step for `seconds`."""
        name = end_name(self.attempt.generation)
        report_incident(self.storage, self.run_id, name, "hung", f"rank {rank} hung for {seconds} s")


@contextlib.contextmanager
def hold_run(storage: Storage, plan: TrainPlan, owner: str, world_size: int, folder: Path) -> Iterator[HeldRun]:
    """Hold a run for one attempt, from its newest whole checkpoint. Every rank must enter the block.

    Rank 0 takes the lease and chooses the checkpoint; every rank gets the same one, and its files below `folder`. An
    error that ends the block is recorded as an incident. The lease is released at the end, finished or not.

    Raises RunIsTaken, and any StorageError of rank 0, on all ranks."""
    lease: Lease | None = None
    with contextlib.ExitStack() as held:

        def begin() -> tuple[Commit | None, Attempt]:
            nonlocal lease
            lease = held.enter_context(hold_lease(storage, plan.run_id, owner, plan.config.checkpoint.lease_seconds))
            generation = lease.generation

            def on_skip(step: int, error: StorageError) -> None:
                name = f"{generation:04d}-skipped-{step}"
                report_incident(storage, plan.run_id, name, "checkpoint_skipped", str(error))

            newest = fetch_newest(storage, plan.run_id, folder, on_skip)
            return newest, lease.begin(uuid.uuid4().hex[:12], newest.step if newest else 0, world_size)

        commit, attempt = run_on_rank_0(begin)
        held.enter_context(record_end(storage, plan.run_id, attempt.generation))
        if commit is not None and lease is None:
            fetch(storage, commit, folder)
        yield HeldRun(storage, plan.run_id, attempt, commit, folder if commit else None, lease)
