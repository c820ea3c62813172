"""Everything that tercet raises on purpose.

    TercetError                 1   the root: message, hint, exit code
    ├── ConfigError             2   a recipe or a flag is wrong
    ├── DataError               3   rows or a dataset version are wrong
    │   ├── TooManyBadRows      3   the share of bad rows is above the limit; nothing was published
    │   └── DatasetNotFound     3   no such dataset, or no such version of it
    ├── PlanError               4   the recipe is valid, but cannot work on this data or these workers
    ├── StorageError            5   storage did not do what was asked
    │   ├── ObjectNotFound      5   no such object
    │   ├── AlreadyExists       5   put-if-absent found an object
    │   ├── Conflict            5   compare-and-swap found another value than expected
    │   │   └── ChampionMoved   5   another publisher moved the champion: compare with the new one
    │   ├── AccessDenied        5   credentials missing, wrong or expired
    │   ├── BucketNotFound      5   no such bucket
    │   ├── StorageUnavailable  5   no answer after all retries
    │   ├── DiskFull            5   a disk of this machine, or the folder that is the storage, has no room
    │   ├── LeaseLost           5   another attempt has taken the run over
    │   └── CorruptObject       5   the bytes are not those that were committed (sha256)
    ├── TrainingError           6   training started and did not succeed
    │   ├── RunIsTaken          6   another attempt at the same run lives
    │   ├── Preempted           6   the machine was taken away, with notice; the run was saved
    │   ├── OutOfMemory         6   a worker had not the memory for a step
    │   ├── NonFiniteError      6   NaN or Inf in a loss, gradient, weight, embedding or metric
    │   └── LearnedNothing      6   the weights did not move
    └── JobError                7   a submitted Ray job failed, or was stopped

The number is the exit code of the command line. All of them survive pickling, because Ray carries them between
processes.
"""

from __future__ import annotations


class TercetError(Exception):
    """Something a person can act on: what happened (`message`) and what to do (`hint`)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


def first_line(error: object) -> str:
    """Of what an error of a library says, which may be nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ConfigError(TercetError):
    """A recipe or a flag is wrong."""

    exit_code = 2


class DataError(TercetError):
    """Rows or a dataset version are wrong."""

    exit_code = 3


class TooManyBadRows(DataError):
    """The share of bad rows is above the limit; nothing was published."""


class DatasetNotFound(DataError):
    """There is no such dataset, or no such version of it."""


class PlanError(TercetError):
    """The recipe is valid, but cannot work on this data or these workers."""

    exit_code = 4


class StorageError(TercetError):
    """Storage did not do what was asked."""

    exit_code = 5


class ObjectNotFound(StorageError):
    """There is no such object."""


class AlreadyExists(StorageError):
    """Put-if-absent found an object of that name."""


class Conflict(StorageError):
    """Compare-and-swap found another value than the expected one."""


class ChampionMoved(Conflict):
    """Another publisher moved the champion; a candidate is to be compared with the new one."""


class AccessDenied(StorageError):
    """Credentials are missing, wrong or expired."""


class BucketNotFound(StorageError):
    """There is no such bucket."""


class StorageUnavailable(StorageError):
    """Storage gave no answer after all retries."""


class DiskFull(StorageError):
    """A disk of this machine has no room, or the folder that is the storage has none."""


class LeaseLost(StorageError):
    """Another attempt at the same run has taken it over; what this one writes does not count any more."""


class CorruptObject(StorageError):
    """The bytes read are not the bytes that were committed."""

    token: str | None = None
    """Of the bytes that lie there, where storage itself found them damaged: `compare_and_swap` replaces them by it."""


class TrainingError(TercetError):
    """Training started and did not succeed."""

    exit_code = 6


class RunIsTaken(TrainingError):
    """Another attempt at the same run lives."""


class Preempted(TrainingError):
    """The machine was taken away, with notice. The run was saved, and goes on with the same command."""


class OutOfMemory(TrainingError):
    """A worker had not the memory for a step."""


class NonFiniteError(TrainingError):
    """NaN or Inf in a loss, a gradient, a weight, an embedding or a metric."""


class LearnedNothing(TrainingError):
    """The weights did not move although the learning rate was above zero."""


class JobError(TercetError):
    """A submitted Ray job failed, or was stopped."""

    exit_code = 7
