"""One attempt at a time may commit for a run; what a dead or disconnected attempt still writes does not count.

The lease, `LEASE.json` in the run's folder, names the holder of the run, the number of renewals, and every attempt with
its first step. It is changed by compare-and-swap alone. Each attempt has a generation, one higher than the attempt
before, and records the step that it resumes from before it trains. From then on, a checkpoint of an older generation
counts only up to that step (`is_fenced`), however late its upload arrives and whether or not its sender knows.

The lease itself only keeps two live attempts from taking a run from each other. It expires when it was not renewed for
its length, as measured by the process that waits: clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tercet.artifacts.journal import end_name, report_incident
from tercet.errors import Conflict, CorruptObject, LeaseLost, ObjectNotFound, RunIsTaken, StorageError
from tercet.storage import Storage
from tercet.storage.documents import Document, Frozen, seal, unseal
from tercet.storage.layout import lease_key

logger = logging.getLogger("tercet")

RENEWALS_PER_LEASE = 4  # so that a few may fail
POLLS_PER_LEASE = 20


class Attempt(Frozen):
    """One start of the worker group, and the step from which it resumed."""

    name: str
    generation: int
    first_step: int
    world_size: int


class Holder(Document):
    """The stored lease. `owner` identifies the driver that starts attempts; `place` and `pid` say where rank 0 runs."""

    run_id: str
    generation: int
    owner: str
    place: str
    pid: int
    since_unix_seconds: float
    num_renewals: int = 0
    released: bool = False
    finished: bool = False
    attempts: tuple[Attempt, ...] = ()

    def text(self) -> str:
        """Return a human-readable description of the holder."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.since_unix_seconds))
        return f"process {self.pid} on {self.place.split()[0]} since {since} UTC"

    def unfinished_attempt(self) -> Attempt | None:
        """Return the attempt that is training, or that ended without finishing; else None."""
        began = self.attempts[-1:] if not self.finished else ()
        return next((attempt for attempt in began if attempt.generation == self.generation), None)

    def is_gone(self) -> bool:
        """Whether it certainly no longer runs: it said so, or it was a process of this machine that has ended."""
        return self.released or (self.place == _place() and not Path(f"/proc/{self.pid}").exists())


def read_attempts(storage: Storage, run_id: str) -> tuple[Attempt, ...]:
    """Return every attempt of a run that began to train, in order of generation. Raises CorruptObject."""
    holder, _ = _read(storage, run_id)
    return holder.attempts if holder is not None else ()


def is_fenced(attempt: Attempt, step: int, attempts: Iterable[Attempt]) -> bool:
    """Whether a checkpoint does not count, because a later attempt resumed from a step before it."""
    return any(later.generation > attempt.generation and later.first_step < step for later in attempts)


class Lease:
    """A lease on a run. Rank 0 of an attempt holds it, and a thread renews it until `release`."""

    def __init__(self, storage: Storage, run_id: str, owner: str, seconds: float) -> None:
        """Take the lease. A holder that has the same owner, or is certainly gone, is replaced at once; any other, once
        its lease has expired. Workers of a driver that was just killed run on for a while: they get that time to end.

        Raises RunIsTaken if the holder is still alive after `2 * seconds`."""
        self._storage, self._run_id, self._seconds = storage, run_id, seconds
        self._holder, self._token, before = _take(storage, run_id, owner, seconds)
        self.unfinished_before = before.unfinished_attempt() if before is not None else None
        """The attempt that this one replaced, if that did not finish."""
        self._lost: LeaseLost | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """Generation of this attempt."""
        return self._holder.generation

    def begin(self, name: str, first_step: int, world_size: int) -> Attempt:
        """Record the step from which this attempt resumes. Until then, commits of an older attempt still count."""
        generation = self._holder.generation
        attempt = Attempt(name=name, generation=generation, first_step=first_step, world_size=world_size)
        self._swap({"attempts": (*self._holder.attempts, attempt)})
        self.check()
        return attempt

    def check(self) -> None:
        """Raise LeaseLost if another attempt is known to have taken over the run. Sends no request."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Do the same after asking storage: a process that was suspended may not know yet. Raises StorageError too."""
        self._swap({})
        self.check()

    def release(self, finished: bool = True) -> None:
        """Record that this attempt has ended, and whether it finished."""
        self._end.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(StorageError):  # then the lease expires
                self._swap({"released": True, "finished": finished})

    def _renew(self) -> None:
        while not self._end.wait(self._seconds / RENEWALS_PER_LEASE):
            try:
                self._swap({})
            except StorageError as error:  # one lost renewal does no harm: the next may succeed
                logger.warning("the lease of run %s could not be renewed: %s", self._run_id, error)
            if self._lost is not None:
                return

    def _swap(self, changes: dict[str, object]) -> None:
        with self._lock:
            if self._lost is not None:
                return
            renewal = {"num_renewals": self._holder.num_renewals + 1}
            changed = self._holder.model_copy(update=renewal | changes)
            try:
                self._token = self._storage.compare_and_swap(lease_key(self._run_id), seal(changed), self._token)
                self._holder = changed
            except Conflict:
                self._explain_conflict(changed)

    def _explain_conflict(self, wanted: Holder) -> None:
        holder, token = _read(self._storage, self._run_id)
        if holder == wanted and token is not None:  # this swap succeeded, and its reply was lost
            self._holder, self._token = wanted, token
            return
        who = "" if holder is None else f" by {holder.text()}"
        self._lost = LeaseLost(
            f"run {self._run_id} was taken over{who}; what this attempt writes from now on does not count",
            hint="Nothing is lost: the run continues there.",
        )


@contextlib.contextmanager
def hold_lease(storage: Storage, run_id: str, owner: str, seconds: float) -> Iterator[Lease]:
    """Take the lease of a run, and release it at the end of the block: as finished, unless the block raises.

    The attempt before is recorded as lost if it ended without a record. Raises RunIsTaken."""
    lease = Lease(storage, run_id, owner, seconds)
    finished = False
    try:
        if (lost := lease.unfinished_before) is not None:
            message = "it ended without saying why: a worker was killed, or its machine was lost"
            report_incident(storage, run_id, end_name(lost.generation), "lost", message)
        yield lease
        finished = True
    finally:
        lease.release(finished)


def _take(storage: Storage, run_id: str, owner: str, seconds: float) -> tuple[Holder, str, Holder | None]:
    began = heard = time.monotonic()
    held, last_token = _read(storage, run_id)
    if held is not None and held.owner != owner and not held.is_gone():
        logger.info(
            "run %s is held: %s; if that process is dead, this one takes over in %.0f s", run_id, held.text(), seconds
        )
    while True:
        held, token = _read(storage, run_id)
        now = time.monotonic()
        if token != last_token:  # a sign of life
            last_token, heard = token, now
        if held is None or held.owner == owner or held.is_gone() or now - heard > seconds:
            holder = _next_holder(run_id, held, owner)
            try:
                return holder, storage.compare_and_swap(lease_key(run_id), seal(holder), token), held
            except Conflict:
                continue  # another attempt was quicker, or the holder is alive: read again
        if now - began > 2 * seconds:
            raise RunIsTaken(
                f"run {run_id} is being trained: {held.text()}",
                hint="Wait for it, or choose another --run-id. If it dies, the same command takes over.",
            )
        time.sleep(seconds / POLLS_PER_LEASE)


def _next_holder(run_id: str, held: Holder | None, owner: str) -> Holder:
    return Holder(
        run_id=run_id,
        generation=held.generation + 1 if held else 1,
        owner=owner,
        place=_place(),
        pid=os.getpid(),
        since_unix_seconds=time.time(),
        attempts=held.attempts if held else (),
    )


def _read(storage: Storage, run_id: str) -> tuple[Holder | None, str | None]:
    uri = storage.uri_of(lease_key(run_id))
    hint = "It says which process trains this run. If none does, delete it and start again."
    try:
        data, token = storage.read_versioned(lease_key(run_id))
    except ObjectNotFound:
        return None, None
    holder = unseal(Holder, data, uri, hint)
    if holder.run_id != run_id:
        raise CorruptObject(f"{uri} is the lease of run {holder.run_id}", hint)
    return holder, token


def _place() -> str:
    """Return the name of this machine and its namespace of process ids."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is no path
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()} {namespace}"
