"""The incidents of a run, one small document each, counted by kind in the report; and its events.

Each incident is written once: `<generation>-end` says how an unfinished attempt ended; others are
`<generation>-skipped-<step>` and `driver-<n>`. A process killed by SIGKILL cannot report its end: the driver does, or
else the attempt that takes over. So each attempt has one end, reported by the process nearest to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from tercet.errors import (
    AccessDenied,
    AlreadyExists,
    BatchTooLarge,
    ConfigError,
    CorruptObject,
    DiskFull,
    GpuOutOfMemory,
    LearnedNothing,
    LeaseLost,
    NonFiniteError,
    ObjectNotFound,
    OutOfMemory,
    Preempted,
    StartAgain,
    StorageError,
    StorageUnavailable,
    TercetError,
    first_line,
)
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, seal, unseal

logger = logging.getLogger("tercet")

# The first class that matches gives the kind.
_KINDS: tuple[tuple[type[TercetError], str], ...] = (
    (OutOfMemory, "out_of_memory"),
    (BatchTooLarge, "out_of_memory"),
    (StartAgain, "out_of_memory"),
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


# Messages of safetensors 0.8 and torch 2.13 when the disk is full.
_WRITE_FAILED = ("No space left on device", "iostream error", "unexpected pos")


# Texts of torch 2.13, CUDA's libraries and NCCL 2.29 when the memory of a GPU is full.
_GPU_IS_FULL = re.compile(
    r"\bout of memory\b|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUFFT_ALLOC_FAILED"
    r"|CU[A-Z]+_STATUS_(\w*_)?(ALLOC|DEVICE_ALLOCATION)_FAILED",
    re.IGNORECASE,
)
# Texts of torch when the machine's memory is full; and errors of cuBLAS and NCCL that nearly always mean a full GPU,
# but not certainly.
_MEMORY_IS_FULL = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|unhandled cuda error(?!.*cuda failure)",
    re.IGNORECASE | re.DOTALL,
)


class Incident(Document):
    """One thing that went wrong, and when."""

    once_unsealed: ClassVar[bool] = True

    kind: str
    message: str
    unix_seconds: float


def kind_of(error: BaseException) -> str | None:
    """Return the incident kind of an error, or None if its type has none."""
    return next((kind for cls, kind in _KINDS if isinstance(error, cls)), None)


def as_tercet_error(error: BaseException) -> BaseException:
    """Return an error about memory or disk as a tercet error, any other unchanged. torch and safetensors have errors of
    their own for both, recognisable only by their messages."""
    if isinstance(error, TercetError):
        return error
    text = str(error)
    if (kind_of_memory := _memory_error(error, text)) is not None:
        return kind_of_memory(
            f"out of memory: {_line_about_memory(text) or first_line(error)}",
            hint="Raise training.gradient_accumulation_steps (smaller micro-batches), set "
            "training.gradient_checkpointing=true, or let workers.parallelism shard the model.",
        )
    if isinstance(error, RuntimeError) and "does not have a deterministic implementation" in text:
        return ConfigError(
            f"training.deterministic: {first_line(error)}",
            hint="Set training.deterministic=false: torch cannot compute this model with the same bits twice on a GPU.",
        )
    is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "/dev/shm" in text and (is_disk or _WRITE_FAILED[0] in text):
        line = next(line.strip() for line in text.splitlines() if "/dev/shm" in line)
        return DiskFull(
            f"the shared memory of this machine is full: {line}",
            hint="Give the container more at /dev/shm: `--shm-size` of Docker, or a volume of kind Memory in a pod.",
        )
    if is_disk or any(words in text for words in _WRITE_FAILED):
        return DiskFull(
            f"a disk of this machine is full, or fails: {first_line(error)}",
            hint="A checkpoint stays in TMPDIR until it is uploaded: make room for two, or choose a larger disk.",
        )
    return error


def _memory_error(error: BaseException, text: str) -> type[OutOfMemory] | None:
    """Return the class for an error about memory, None for any other. torch's own are RuntimeErrors."""
    is_torch = isinstance(error, RuntimeError)
    if is_torch and (type(error).__name__ == "OutOfMemoryError" or _GPU_IS_FULL.search(text)):
        return GpuOutOfMemory
    is_full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_full or (is_torch and _MEMORY_IS_FULL.search(text)):
        return OutOfMemory
    return None


def _line_about_memory(text: str) -> str | None:
    """Return the line that names the cause: NCCL's comes after one about its source."""
    return next((line.strip() for line in text.splitlines() if _GPU_IS_FULL.search(line)), None)


def end_name(generation: int) -> str:
    """Return the name of the incident that ended an attempt."""
    return f"{generation:04d}-end"


def report_incident(storage: Storage, run_id: str, name: str, kind: str, message: str) -> None:
    """Record an incident, unless one of that name exists. If storage fails too, log a warning instead."""
    incident = Incident(kind=kind, message=message, unix_seconds=round(time.time(), 3))
    try:
        storage.put_if_absent(layout.incident_key(run_id, name), seal(incident))
    except AlreadyExists:
        pass
    except StorageError as error:
        logger.warning("could not record an incident, %s (%s): %s", kind, message, error)


@contextlib.contextmanager
def record_end(storage: Storage, run_id: str, generation: int) -> Iterator[None]:
    """Record why an attempt ended, if the block raises an error that says so.

    Raises tercet's own error in place of a library's, where `as_tercet_error` knows one."""
    try:
        yield
    except BaseException as error:
        own = as_tercet_error(error)
        if (kind := kind_of(own)) is not None:
            report_incident(storage, run_id, end_name(generation), kind, str(own))
        if own is error:
            raise
        raise own from error


def counts(storage: Storage, run_id: str) -> dict[str, int]:
    """Return the number of incidents of a run by kind, sorted by kind."""
    kinds = Counter(
        _read_kind(storage, key) for key in storage.list(layout.incidents_prefix(run_id)) if key.endswith(".json")
    )
    return dict(sorted(kinds.items()))


def _read_kind(storage: Storage, key: str) -> str:
    try:
        return unseal(Incident, storage.read(key), storage.uri_of(key)).kind
    except CorruptObject:
        return "unreadable"


_LAST_EVENTS = ("run finished", "run failed")


class Events:
    """The run's events.jsonl: what happened, when, and how long each stage took. Every event rewrites the whole file,
    because object storage has no append."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._key = storage, layout.events_key(run_id)
        self.seconds: dict[str, float] = {}
        self.stage = "plan"
        try:
            self._lines = storage.read(self._key).decode().splitlines()
            last = json.loads(self._lines[-1])["event"] if self._lines else None
        except ObjectNotFound:
            self._lines, last = [], None
        except (CorruptObject, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged; a new one is begun: %s", storage.uri_of(self._key), error)
            self._lines, last = [], None
        if last is not None and last not in _LAST_EVENTS:
            message = "an earlier driver of this run died without reporting"
            report_incident(storage, run_id, f"driver-{len(self._lines)}", "driver_lost", message)

    def add(self, event: str, **details: Any) -> None:
        """Record an event with the present time."""
        self._lines.append(json.dumps({"unix_seconds": round(time.time(), 3), "event": event, **details}))
        self._storage.put(self._key, ("\n".join(self._lines) + "\n").encode())

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Record the start and the end of a stage, and its seconds. Yields further details of the end."""
        self.stage = stage
        self.add(f"{stage} started")
        started = time.monotonic()
        details: dict[str, Any] = {}
        yield details
        self.seconds[stage] = time.monotonic() - started
        self.add(f"{stage} finished", seconds=round(self.seconds[stage], 3), **details)
