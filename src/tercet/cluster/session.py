"""Join a Ray cluster or start one on this machine, and run work on it while its head answers."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tercet.config.recipe import Config
from tercet.config.sections import WorkersConfig
from tercet.errors import ConfigError, TercetError, TrainingError, first_line

Result = TypeVar("Result")

# The driver's environment does not reach Ray's workers by itself.
PASSED_ENVIRONMENT = ("AWS_", "HF_", "TERCET_", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "NCCL_", "GLOO_")

# How often Ray Train asks its workers for news; 2 s by default, which each report waits for.
HEALTH_CHECK_SECONDS = "0.5"


def environment(workers: WorkersConfig) -> dict[str, str]:
    """The environment variables of every worker."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ENVIRONMENT)}
    return {
        "TOKENIZERS_PARALLELISM": "false",
        **passed,
        # More threads than cores spin against each other: two workers of two threads on two cores are ten times slower.
        "OMP_NUM_THREADS": str(workers.cpus_per_worker),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_SECONDS,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(workers.start_timeout_seconds),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }


def start_ray(workers: WorkersConfig) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine that ends with this process.

    Raises ConfigError for an address that is none, TrainingError when no cluster answers there."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # a submitted job has an environment already: add to it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    arguments: dict[str, Any] = {}
    address = cluster_address()
    if not address:
        # A token of this process alone: by default Ray would write one to the home folder, for all clusters to come.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default a worker gives way to everything else
        # Nobody drains a node of this cluster; and the watcher begins with an error of Ray's core on the screen.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        num_cpus = max(os.cpu_count() or 1, (workers.min or workers.num_workers) * workers.cpus_per_worker)
        arguments = {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1", "num_cpus": num_cpus}
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        return
    try:
        if re.fullmatch(r"[^/]+:\d+", address):
            wait_for_head(address)
        ray.init(
            runtime_env={"env_vars": environment(workers)},
            logging_level=logging.WARNING,
            log_to_driver=True,
            **arguments,
        )
    except (ValueError, ConnectionError, RayError) as error:
        if not address:
            raise
        what = f"cannot join the Ray cluster of RAY_ADDRESS={address}: {first_line(error)}"
        hint = "it is the head's own address, such as 10.0.0.1:6379; without it, this machine alone is used"
        raise (ConfigError if isinstance(error, ValueError) else TrainingError)(what, hint=hint) from None


def cluster_address() -> str:
    """Of the cluster to join; empty for one that ends with this process."""
    return os.environ.get("RAY_ADDRESS", "")


def with_devices(config: Config) -> Config:
    """With `use_gpu: auto` settled by what the cluster has."""
    import ray

    workers = config.workers
    if workers.use_gpu != "auto":
        return config
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    return config.model_copy(update={"workers": workers.model_copy(update={"use_gpu": use_gpu})})


def in_fresh_processes(workers: WorkersConfig, tasks: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """What each task returns: each in a process of its own with a worker's resources, which has seen nothing of
    training. Raises a task's own TercetError."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources = worker_resources(workers)
    # max_calls=1: the process ends afterwards, and a new one never reuses it.
    remote = ray.remote(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_calls=1, max_retries=workers.max_failures
    )(_call)
    pending = {name: remote.remote(task) for name, task in tasks.items()}
    try:
        return run_while_head_alive(lambda: {name: ray.get(reference) for name, reference in pending.items()})
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, TercetError) else error from None
    except RayError as error:
        raise TrainingError(
            f"{', '.join(tasks)}: a process did not finish: {first_line(error)}",
            hint="the same command again: what is committed is kept, only this is repeated",
        ) from error


def _call(task: Callable[[], Result]) -> Result:
    return task()


def worker_resources(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": workers.cpus_per_worker, **({"GPU": 1.0} if workers.use_gpu is True else {})}


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


def run_while_head_alive(work: Callable[[], T]) -> T:
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
