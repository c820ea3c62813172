"""Waits for the head of a cluster that end.

Ray 2.60 tries for more than eight minutes to join a head that does not answer. One that stops answering it gives a
while to come back, and then ends the driver from within: by an exit that leaves no report and does not say what to do.
"""

from __future__ import annotations

import concurrent.futures
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tercet.errors import TrainingError

T = TypeVar("T")

POLL_SECONDS = 1.0
RAY_PATIENCE = ("RAY_gcs_rpc_server_reconnect_timeout_s", "60")  # Ray's own name and default


def wait_for_head(address: str) -> None:
    """Returns when something answers at `address`, host:port. Raises TrainingError after half the time that Ray gives
    a head to come back, and ValueError for a host that cannot be one."""
    ends_at = time.monotonic() + _patience_seconds()
    while not _answers(address):
        if time.monotonic() > ends_at:
            raise TrainingError(
                f"no Ray cluster answers at {address} (RAY_ADDRESS)",
                hint="start its head, or unset RAY_ADDRESS to run on this machine alone",
            )
        time.sleep(POLL_SECONDS)


def while_head_answers(work: Callable[[], T]) -> T:
    """What `work` returns or raises; it runs in a thread of its own, so that a lost head cannot hold this one.

    Raises TrainingError when the head did not answer for half the time that Ray gives it. The process cannot live long
    after that: Ray's farewell to a cluster that is gone ends it, with an exit code of Ray's own."""
    import ray

    address, patience_seconds = ray.get_runtime_context().gcs_address, _patience_seconds()
    done = _in_thread(work)
    answered_at = time.monotonic()
    while not concurrent.futures.wait([done], timeout=POLL_SECONDS).done:
        if _answers(address):
            answered_at = time.monotonic()
        elif time.monotonic() - answered_at > patience_seconds:
            raise TrainingError(
                f"the head of the Ray cluster, {address}, has not answered for {patience_seconds:.0f} s",
                hint="start the cluster again, then the same command: the run goes on from its last checkpoint",
            )
    return done.result()


def _in_thread(work: Callable[[], T]) -> concurrent.futures.Future[T]:
    """A thread that the end of the process does not wait for, unlike those of an executor."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried to who waits
            future.set_exception(error)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return future


def _patience_seconds() -> float:
    return float(os.environ.get(*RAY_PATIENCE)) / 2


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=POLL_SECONDS):
            return True
    except OSError:
        return False
