"""Which rows each optimizer step consumed, as one number per step, committed with the checkpoint.

    ledger-00000-of-00002.npy    part of rank 0 of 2: shape (num_steps,), uint64, from step 0 of the run

A step's number is the sum, modulo 2^64, of a hash of each row that it consumed, added up over ranks. So it does not
depend on the number of workers, which may change during a run, and takes 8 bytes per step and rank. The ledger records
what was trained on, not what the order of rows planned: `verify_rows` compares the two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tercet.artifacts.checkpoint import Commit, fetch, read_commits
from tercet.data.order import Rows, mixed_batches, num_steps_per_epoch, splitmix64
from tercet.errors import CorruptObject, ObjectNotFound, TrainingError
from tercet.planning.plan import TrainPlan, check_engine
from tercet.storage import Storage
from tercet.storage.documents import Frozen

Digests = npt.NDArray[np.uint64]


def file_name(rank: int, world_size: int) -> str:
    """Return the name of one rank's part."""
    return f"ledger-{rank:05d}-of-{world_size:05d}.npy"


def digest(rows: npt.ArrayLike) -> int:
    """Return the sum of a hash of each row, modulo 2^64. A row that occurs twice counts twice."""
    # An offset, because 0 is a fixed point of the mixing function.
    hashes = splitmix64(np.asarray(rows, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return int(hashes.sum(dtype=np.uint64))


class Ledger:
    """One rank's part of the ledger: a number for each step so far, and one for the step that is running."""

    def __init__(self) -> None:
        self._closed: list[int] = []
        self._open = 0

    def consume(self, rows: list[int]) -> None:
        """Add rows to the step that is running."""
        self._open = (self._open + digest(rows)) % 2**64

    def close_step(self) -> None:
        """End the step that is running."""
        self._closed.append(self._open)
        self._open = 0

    def save(self, folder: Path, rank: int, world_size: int, num_steps: int) -> None:
        """Write this rank's part to a folder. Raises TrainingError unless it has exactly `num_steps` steps."""
        if len(self._closed) != num_steps:
            raise TrainingError(
                f"the ledger has the rows of {len(self._closed)} steps, but {num_steps} were trained",
                hint="this is a fault of tercet or of the installed transformers",
            )
        np.save(folder / file_name(rank, world_size), np.array(self._closed, dtype=np.uint64))

    def load(self, folder: Path, rank: int) -> None:
        """Resume from a checkpoint, perhaps of another number of ranks: rank 0 takes over the sum of all parts."""
        digests = read(folder)
        self._closed = digests.tolist() if rank == 0 else [0] * len(digests)
        self._open = 0


def read(folder: Path) -> Digests:
    """Return each step's number, summed over ranks: shape (num_steps,).

    Raises CorruptObject when a rank's part is missing, damaged, or has another length than the others."""
    paths = sorted(folder.glob("ledger-*-of-*.npy"))
    world_size = int(paths[0].stem.rpartition("-")[2]) if paths else 1
    try:
        parts = [np.load(folder / file_name(rank, world_size)) for rank in range(world_size)]
        total: Digests = np.stack(parts).sum(axis=0, dtype=np.uint64)
    except (OSError, ValueError) as error:
        raise CorruptObject(f"{folder}: the ledger cannot be read: {error}", hint="use another checkpoint") from error
    return total


NUM_SHOWN = 5


class PassProof(Frozen):
    """What one pass over one dataset consumed, as far as the run has come."""

    dataset: str
    number: int
    """Counted from 0."""
    num_rows: int
    """Rows of the dataset that are trained on."""
    num_rows_consumed: int
    """Distinct rows that were consumed."""
    num_rows_repeated: int
    """How many times a row was consumed again. Anything but 0 is a fault."""
    num_rows_left_out: int
    """Rows at the end of a pass that fill no global batch; 0 for a pass that has not ended."""
    ended: bool

    def text(self) -> str:
        """Return the proof as one line for the screen."""
        state = f"{self.num_rows_left_out:,} left over (they fill no batch)" if self.ended else "not ended"
        repeated = f", WRONG: {self.num_rows_repeated:,} repeated" if self.num_rows_repeated else " once each"
        rows = f"{self.num_rows_consumed:,} of {self.num_rows:,} rows{repeated}"
        return f"{self.dataset}, pass {self.number}: {rows}, {state}"


class RowsProof(Frozen):
    """What the ledger of a run proves about the rows that it consumed."""

    run_id: str
    num_steps: int
    """Steps up to the newest checkpoint."""
    num_planned_steps: int
    attempts: tuple[str, ...]
    """Each attempt that the checkpoint builds on, oldest first, as text."""
    wrong_steps: tuple[int, ...]
    """Steps, counted from 1, that consumed other rows than the order of rows says."""
    passes: tuple[PassProof, ...]

    @property
    def holds(self) -> bool:
        """Whether every step consumed its own rows, and no pass consumed a row twice."""
        return not self.wrong_steps and all(part.num_rows_repeated == 0 for part in self.passes)

    def text(self) -> str:
        """Return the proof as a few lines for the screen."""
        lines = [f"{self.run_id}: {self.num_steps:,} of {self.num_planned_steps:,} steps", *self.attempts]
        lines += [part.text() for part in self.passes]
        if self.wrong_steps:
            shown = ", ".join(f"{step:,}" for step in self.wrong_steps[:NUM_SHOWN])
            more = "" if len(self.wrong_steps) <= NUM_SHOWN else f" and {len(self.wrong_steps) - NUM_SHOWN:,} more"
            lines.append(f"WRONG: step {shown}{more} consumed other rows than the order says")
        elif self.holds:
            lines.append("every step consumed the rows that the order says")
        return "\n  ".join(lines)


def verify_rows(storage: Storage, plan: TrainPlan) -> RowsProof:
    """Compare the ledger of a run's newest whole checkpoint with the order of rows, computed again from the data.

    Raises TrainingError while there is no checkpoint, CorruptObject when none can be read, PlanError for an engine that
    is not supported."""
    check_engine(plan.engine, plan.run_id)
    commit, digests = _newest_ledger(storage, plan)
    counts = _Counts(plan)
    wrong = []
    for step, batch in zip(range(1, len(digests) + 1), _batches(storage, plan), strict=False):
        counts.add(batch)
        if digest(batch) != int(digests[step - 1]):
            wrong.append(step)
    ends = [*(attempt.first_step for attempt in commit.lineage[1:]), commit.step]
    return RowsProof(
        run_id=plan.run_id,
        num_steps=len(digests),
        num_planned_steps=plan.num_steps,
        attempts=tuple(
            f"attempt {attempt.name}: steps {attempt.first_step + 1:,} to {end:,} on {attempt.world_size} workers"
            for attempt, end in zip(commit.lineage, ends, strict=True)
        ),
        wrong_steps=tuple(wrong),
        passes=tuple(counts.passes()),
    )


def _newest_ledger(storage: Storage, plan: TrainPlan) -> tuple[Commit, Digests]:
    commits = read_commits(storage, plan.run_id)
    for commit in commits:
        names = [path for path in commit.files if path.startswith("ledger-")]
        with tempfile.TemporaryDirectory(prefix="tercet-ledger-") as folder:
            try:
                return commit, read(fetch(storage, commit, Path(folder), names))
            except (CorruptObject, ObjectNotFound):
                continue
    if commits:
        what = f"no checkpoint of run {plan.run_id} has a ledger that can be read"
        raise CorruptObject(what, hint="its rows cannot be verified; train again with a new --run-id")
    raise TrainingError(f"run {plan.run_id} has no checkpoint yet", hint="verify it after its first checkpoint")


def _batches(storage: Storage, plan: TrainPlan) -> Iterator[Rows]:
    """Yield every global batch of the run in order: row numbers over all datasets, shape (global_batch_size,), or
    smaller for the last one of a pass, where it is kept."""
    from tercet.planning.rows import load_splits, load_train_rows, rows_to_order

    training = plan.config.training
    datasets = rows_to_order(plan, load_train_rows(plan, storage, load_splits(plan, storage)))
    for epoch in range(training.num_epochs):
        yield from mixed_batches(datasets, training.global_batch_size, training.seed, epoch)


class _Counts:
    """Counts how often each row was consumed in each pass."""

    def __init__(self, plan: TrainPlan) -> None:
        self._datasets, training = plan.datasets, plan.config.training
        self._per_pass = [
            num_steps_per_epoch(
                dataset.num_train_rows, training.global_batch_size, keeps_last=training.last_batch == "keep"
            )
            for dataset in plan.datasets
        ]
        self._ends = np.cumsum([dataset.num_train_rows for dataset in plan.datasets])
        self._used = [np.zeros(dataset.num_train_rows, dtype=np.uint8) for dataset in plan.datasets]
        self._num_batches = [0] * len(plan.datasets)
        self._passes: list[list[PassProof]] = [[] for _ in plan.datasets]

    def add(self, batch: Rows) -> None:
        """Count the rows of a global batch, which all belong to one dataset."""
        number = int(np.searchsorted(self._ends, batch[0], side="right"))
        first = 0 if number == 0 else int(self._ends[number - 1])
        np.add.at(self._used[number], batch - first, 1)
        self._num_batches[number] += 1
        if self._num_batches[number] == self._per_pass[number]:
            self._close(number, ended=True)

    def passes(self) -> Iterator[PassProof]:
        """Yield each dataset's passes in order; a pass that has not ended is last."""
        for number, batches in enumerate(self._num_batches):
            if batches:
                self._close(number, ended=False)
            yield from self._passes[number]

    def _close(self, number: int, ended: bool) -> None:
        used = self._used[number]
        num_used = int(np.count_nonzero(used))
        self._passes[number].append(
            PassProof(
                dataset=self._datasets[number].name,
                number=len(self._passes[number]),
                num_rows=len(used),
                num_rows_consumed=num_used,
                num_rows_repeated=int(used.sum(dtype=np.int64)) - num_used,
                num_rows_left_out=len(used) - num_used if ended else 0,
                ended=ended,
            )
        )
        used[:] = 0
        self._num_batches[number] = 0
