"""Errors that tercet raises on purpose.

    TercetError                 1   the root: message, hint, exit code
    ├── ConfigError             2   a recipe or a flag is wrong
    │   └── BatchTooLarge       2   the longest micro-batch of the run does not fit into the memory of a worker
    ├── DataError               3   rows or a dataset version are wrong
    │   ├── TooManyBadRows      3   the share of bad rows is above the limit; nothing was published
    │   └── DatasetNotFound     3   no such dataset, or no such version of it
    ├── PlanError               4   the recipe is valid, but cannot work with this data or these workers
    ├── StorageError            5   a storage request failed
    │   ├── ObjectNotFound      5   no such object
    │   ├── AlreadyExists       5   put-if-absent found an object
    │   ├── Conflict            5   compare-and-swap did not find the expected value
    │   │   └── ChampionMoved   5   another publisher moved the champion: compare with the new one
    │   ├── AccessDenied        5   credentials missing, wrong or expired
    │   ├── BucketNotFound      5   no such bucket
    │   ├── StorageUnavailable  5   no answer after all retries
    │   ├── DiskFull            5   a disk of this machine, or the storage folder, is full
    │   ├── LeaseLost           5   another attempt has taken over the run
    │   └── CorruptObject       5   the bytes differ from those that were written (sha256)
    ├── TrainingError           6   training started and did not succeed
    │   ├── RunIsTaken          6   another attempt at the same run is alive
    │   ├── Preempted           6   the machine was preempted, with notice; the run was saved
    │   ├── StartAgain          6   the run decided for smaller micro-batches: the same command starts it with them
    │   ├── OutOfMemory         6   a worker ran out of memory
    │   │   └── GpuOutOfMemory  6   a GPU is too small for the batch
    │   ├── NonFiniteError      6   NaN or Inf in a loss, gradient, weight, embedding or metric
    │   └── LearnedNothing      6   the weights did not change
    └── JobError                7   a submitted Ray job failed or was stopped

The number is the exit code of the command line. All errors survive pickling, because Ray carries them between
processes.
"""

from __future__ import annotations


class TercetError(Exception):
    """An error that a user can act on: `message` says what happened, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


def first_line(error: object) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(TercetError):
    """A recipe or a flag is wrong."""

    exit_code = 2


class BatchTooLarge(ConfigError):
    """The longest micro-batch of the run does not fit into the memory of a worker."""

    left_group = False
    """Whether the ranks had to leave their process group, which then cannot be used again."""


class DataError(TercetError):
    """Rows or a dataset version are wrong."""

    exit_code = 3


class TooManyBadRows(DataError):
    """The share of bad rows is above the limit; nothing was published."""


class DatasetNotFound(DataError):
    """There is no such dataset, or no such version of it."""


class PlanError(TercetError):
    """The recipe is valid, but cannot work with this data or these workers."""

    exit_code = 4


class StorageError(TercetError):
    """A storage request failed."""

    exit_code = 5


class ObjectNotFound(StorageError):
    """There is no such object."""


class AlreadyExists(StorageError):
    """Put-if-absent found an object."""


class Conflict(StorageError):
    """Compare-and-swap did not find the expected value."""


class ChampionMoved(Conflict):
    """Another publisher moved the champion: compare the candidate with the new one."""


class AccessDenied(StorageError):
    """Credentials are missing, wrong or expired."""


class BucketNotFound(StorageError):
    """There is no such bucket."""


class StorageUnavailable(StorageError):
    """Storage gave no answer after all retries."""


class DiskFull(StorageError):
    """A disk of this machine, or the storage folder, is full."""


class LeaseLost(StorageError):
    """Another attempt has taken over the run; checkpoints that this one still writes do not count."""


class CorruptObject(StorageError):
    """The bytes read differ from those that were written."""

    token: str | None = None
    """Token of the damaged object, if storage found the damage; pass it to `compare_and_swap` to replace the object."""


class TrainingError(TercetError):
    """Training started and did not succeed."""

    exit_code = 6


class RunIsTaken(TrainingError):
    """Another attempt at the same run is alive."""


class Preempted(TrainingError):
    """The machine was preempted, with notice. The run was saved; the same command resumes it."""


class StartAgain(TrainingError):
    """The run decided for smaller micro-batches, and stored that. The same command starts it with them."""

    needs_new_processes = False
    """Whether the process group of the ranks is lost."""


class OutOfMemory(TrainingError):
    """A worker ran out of memory."""


class GpuOutOfMemory(OutOfMemory):
    """The memory of a worker's GPU is too small. The batch would be the same at the next start, so none is tried."""


class NonFiniteError(TrainingError):
    """NaN or Inf in a loss, a gradient, a weight, an embedding or a metric."""


class LearnedNothing(TrainingError):
    """The weights did not change although the learning rate was above zero."""


class JobError(TercetError):
    """A submitted Ray job failed or was stopped."""

    exit_code = 7
