"""One attempt at a time may commit for a run; what a dead or cut-off one still writes does not count.

The lease, `LEASE.json` in the run's folder, names the holder of the run, the number of renewals, and every attempt with
its first step. It is changed by compare-and-swap alone. Each attempt has a generation, one higher than the attempt
before, and records the step that it resumes from before it trains. From then on, a checkpoint of an older generation
counts only up to that step (`is_fenced`), however late its upload arrives and whether or not its sender knows.

The lease itself only keeps two living attempts from taking a run from each other. It expires when it was not renewed
for its length, as measured by who waits: clocks of two machines are never compared.
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
    """One start of the worker group, and the step that it went on from."""

    name: str
    generation: int
    first_step: int
    world_size: int


class Holder(Document):
    """The document. `owner` is who starts attempts (a driver's launch), `place` and `pid` say where rank 0 runs."""

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
        """Who it is, for a person."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.since_unix_seconds))
        return f"process {self.pid} on {self.place.split()[0]} since {since} UTC"

    def unfinished_attempt(self) -> Attempt | None:
        """What it trains, or trained until something ended it."""
        began = self.attempts[-1:] if not self.finished else ()
        return next((attempt for attempt in began if attempt.generation == self.generation), None)

    def is_gone(self) -> bool:
        """Whether it surely does not run any more: it said so, or it was a process of this machine that has ended."""
        return self.released or (self.place == _place() and not Path(f"/proc/{self.pid}").exists())


def read_attempts(storage: Storage, run_id: str) -> tuple[Attempt, ...]:
    """Every attempt of a run that began to train, in order of generation. Raises CorruptObject."""
    holder, _ = _read(storage, run_id)
    return holder.attempts if holder is not None else ()


def is_fenced(attempt: Attempt, step: int, attempts: Iterable[Attempt]) -> bool:
    """Whether a checkpoint does not count: a later attempt went on from a step before it, without it."""
    return any(later.generation > attempt.generation and later.first_step < step for later in attempts)


class Lease:
    """Held by rank 0 of an attempt, and renewed by a thread of its own until `release`."""

    def __init__(self, storage: Storage, run_id: str, owner: str, seconds: float) -> None:
        """Take the run. An attempt of the same owner is taken over at once, and one that is surely gone; any other when
        it gave no sign of life for the length of the lease. The workers of a driver that was just killed live on for a
        while, so they get that length to end.

        Raises RunIsTaken when it still lives after twice the length."""
        self._storage, self._run_id, self._seconds = storage, run_id, seconds
        self._holder, self._token, before = _take(storage, run_id, owner, seconds)
        self.unfinished_before = before.unfinished_attempt() if before is not None else None
        """The attempt that this one took the run from, where that did not finish."""
        self._lost: LeaseLost | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """Of this attempt."""
        return self._holder.generation

    def begin(self, name: str, first_step: int, world_size: int) -> Attempt:
        """Write down what this attempt goes on from. Until then, what an older one commits still counts."""
        generation = self._holder.generation
        attempt = Attempt(name=name, generation=generation, first_step=first_step, world_size=world_size)
        self._swap({"attempts": (*self._holder.attempts, attempt)})
        self.check()
        return attempt

    def check(self) -> None:
        """Raises LeaseLost when another attempt is known to have taken the run over. Asks nobody."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """As `check`, but storage is asked: a process that stood still for a while may not know yet. StorageError."""
        self._swap({})
        self.check()

    def release(self, finished: bool = True) -> None:
        """Say that this attempt has ended, and whether well."""
        self._end.set()
        self._thread.join()
        if self._lost is None:
            with contextlib.suppress(StorageError):  # then it expires
                self._swap({"released": True, "finished": finished})

    def _renew(self) -> None:
        while not self._end.wait(self._seconds / RENEWALS_PER_LEASE):
            try:
                self._swap({})
            except StorageError as error:  # an answer that does not come is no loss: the next renewal may
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
        found, token = _read(self._storage, self._run_id)
        if found == wanted and token is not None:  # it was this swap, and the answer got lost
            self._holder, self._token = wanted, token
            return
        who = "" if found is None else f" by {found.text()}"
        self._lost = LeaseLost(
            f"run {self._run_id} was taken over{who}; what this attempt writes from now on does not count",
            hint="nothing is lost: the run goes on there",
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
        logger.info("run %s is held: %s; if that is dead, it is taken over in %.0f s", run_id, held.text(), seconds)
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
                continue  # someone else was quicker, or it lives: look again
        if now - began > 2 * seconds:
            raise RunIsTaken(
                f"run {run_id} is being trained: {held.text()}",
                hint="wait for it, or choose another --run-id; if it dies, the same command takes over",
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
    hint = "so it is not known who trains this run; if nobody does, delete it and start again"
    try:
        data, token = storage.read_versioned(lease_key(run_id))
    except ObjectNotFound:
        return None, None
    holder = unseal(Holder, data, uri, hint)
    if holder.run_id != run_id:
        raise CorruptObject(f"{uri} is the lease of run {holder.run_id}", hint)
    return holder, token


def _place() -> str:
    """This machine, and where on it process ids have a meaning."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a link to nowhere
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()} {namespace}"
