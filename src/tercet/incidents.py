"""What went wrong on the way, a small document each, counted by kind in the report.

    runs/<run_id>/incidents/<generation>-end.json         how an attempt ended that did not finish
    runs/<run_id>/incidents/<generation>-skipped-<step>.json, driver-<n>.json

Each is written once. Who dies by SIGKILL cannot say so: the driver does, or else the attempt that takes over. So an
attempt has one end, told by whoever was nearest to it.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import Counter

from pydantic import BaseModel, ConfigDict, ValidationError

from tercet.errors import (
    AccessDenied,
    AlreadyExists,
    CorruptObject,
    DiskFull,
    LearnedNothing,
    LeaseLost,
    NonFiniteError,
    OutOfMemory,
    Preempted,
    StorageError,
    StorageUnavailable,
    TercetError,
    first_line,
)
from tercet.storage import Storage

logger = logging.getLogger("tercet")

# The first that fits.
_KINDS: tuple[tuple[type[TercetError], str], ...] = (
    (OutOfMemory, "out_of_memory"),
    (DiskFull, "disk_full"),
    (NonFiniteError, "non_finite"),
    (LearnedNothing, "learned_nothing"),
    (Preempted, "preempted"),
    (LeaseLost, "taken_over"),
    (AccessDenied, "access_denied"),
    (StorageUnavailable, "storage_unavailable"),
    (CorruptObject, "corrupt_object"),
    (StorageError, "storage_error"),
)


# What safetensors 0.8 and torch 2.13 say when they cannot write on.
_WRITE_FAILED = ("No space left on device", "iostream error", "unexpected pos")


class Incident(BaseModel):
    """One document."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    message: str
    unix_seconds: float


def kind_of(error: BaseException) -> str | None:
    """The kind of an error that says what it is; None for any other."""
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), None)


def typed(error: BaseException) -> BaseException:
    """An error of the memory or of the disk as tercet's own, any other as it is. torch and safetensors have errors of
    their own for both, which only their texts tell apart."""
    if isinstance(error, TercetError):
        return error
    text = str(error)
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or "can't allocate memory" in text:
        return OutOfMemory(
            f"out of memory: {first_line(error)}",
            hint="raise training.gradient_accumulation_steps (smaller micro-batches), set "
            "training.gradient_checkpointing=true, or let workers.parallelism shard the model",
        )
    is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if is_disk or any(words in text for words in _WRITE_FAILED):
        return DiskFull(
            f"a disk of this machine is full, or fails: {first_line(error)}",
            hint="a checkpoint lies in TMPDIR until it is uploaded: give it room for two, or choose a larger disk",
        )
    return error


def end_name(generation: int) -> str:
    """The name of how an attempt ended."""
    return f"{generation:04d}-end"


def tell(storage: Storage, run_id: str, name: str, kind: str, message: str) -> None:
    """Write an incident down, unless one of that name is known. Where storage fails too, a warning must do."""
    incident = Incident(kind=kind, message=message, unix_seconds=round(time.time(), 3))
    try:
        storage.put_if_absent(_key(run_id, name), incident.model_dump_json(indent=1).encode())
    except AlreadyExists:
        pass
    except StorageError as error:
        logger.warning("could not write down an incident, %s (%s): %s", kind, message, error)


def counts(storage: Storage, run_id: str) -> dict[str, int]:
    """The incidents of a run by kind, in the order of the alphabet."""
    kinds = Counter(
        _read_kind(storage, key) for key in storage.list(f"runs/{run_id}/incidents") if key.endswith(".json")
    )
    return dict(sorted(kinds.items()))


def _read_kind(storage: Storage, key: str) -> str:
    try:
        return Incident.model_validate_json(storage.read(key)).kind
    except (ValidationError, CorruptObject):
        return "unreadable"


def _key(run_id: str, name: str) -> str:
    return f"runs/{run_id}/incidents/{name}.json"
