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

from tercet.artifacts.journal import as_tercet_error
from tercet.cluster.devices import choose_devices
from tercet.config.recipe import Config
from tercet.config.sections import WorkersConfig
from tercet.errors import ConfigError, OutOfMemory, TercetError, TrainingError, first_line
from tercet.planning.engine_settings import allocator_environment

logger = logging.getLogger("tercet")

Result = TypeVar("Result")

# Prefixes of the variables that Ray's workers get from the driver. Without this, Ray passes on none. The last four
# are of EFA, Amazon's network: libfabric, its plugin for NCCL, and the library below.
PASSED_ENVIRONMENT = (
    *("AWS_", "HF_", "TERCET_", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "NCCL_", "GLOO_"),
    *("PYTORCH_", "TORCH_", "CUDA_", "CUBLAS_", "CUBLASLT_", "CUDNN_", "NVIDIA_TF32_OVERRIDE"),
    *("FI_", "OFI_NCCL_", "EFA_", "RDMAV_"),
)

# Of these prefixes, what is about one machine stays there: Ray itself gives each worker its GPUs, and a path or an
# installed version of the driver's machine may be wrong on another.
_ABOUT_A_MACHINE = re.compile(
    r"CUDA_VISIBLE_DEVICES|(PYTORCH|TORCH|CUDA|CUBLAS|CUBLASLT|CUDNN|EFA)_(.*_)?(HOME|PATH|ROOT|DIR|DIRECTORY|VERSION)"
)

# How often Ray Train polls its workers. Each report waits for the next poll, and Ray's default is 2 s.
HEALTH_CHECK_SECONDS = "0.5"

POLL_SECONDS = 1.0

RAY_PATIENCE = ("RAY_gcs_rpc_server_reconnect_timeout_s", "60")  # Ray's own name and default


def environment(workers: WorkersConfig) -> dict[str, str]:
    """Return the environment variables of every worker."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ENVIRONMENT) and not _ABOUT_A_MACHINE.fullmatch(name)
    }
    return {
        **allocator_environment(workers.use_gpu, os.environ),
        "TOKENIZERS_PARALLELISM": "false",
        **passed,
        # Threads spin while they wait for each other: two workers of two threads on two cores are ten times slower.
        "OMP_NUM_THREADS": str(workers.cpus_per_worker),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": HEALTH_CHECK_SECONDS,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(workers.start_timeout_seconds),
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }


def start_ray(workers: WorkersConfig) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that ends with this process.

    Raises ConfigError if RAY_ADDRESS is not an address, TrainingError if no cluster answers there."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # a submitted job has an environment already: add to it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    arguments: dict[str, Any] = {}
    address = cluster_address()
    if not address:
        # A token for this process alone. By default Ray would write one to the home folder, and use it ever after.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default every other process goes before a worker
        # Nobody drains a node of this cluster, and the watcher starts with an error of Ray's core on the screen.
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
        message = f"cannot join the Ray cluster of RAY_ADDRESS={address}: {first_line(error)}"
        hint = "RAY_ADDRESS is the address of the head, such as 10.0.0.1:6379; unset it to use this machine alone"
        raise (ConfigError if isinstance(error, ValueError) else TrainingError)(message, hint=hint) from None


def cluster_address() -> str:
    """Return the address of the cluster to join; empty for one that ends with this process."""
    return os.environ.get("RAY_ADDRESS", "")


def with_devices(config: Config, record: Callable[..., object] = dict) -> Config:
    """Return the recipe with `use_gpu: auto` decided. The choice and its reason are always printed.

    record: is called with `use_gpu` and `reason`. Raises PlanError if there can never be enough GPUs."""
    devices = choose_devices(config.workers, cluster_address())
    logger.warning("%s", devices.text())  # the level that a driver shows
    record(use_gpu=devices.use_gpu, reason=devices.reason)
    workers = config.workers.model_copy(update={"use_gpu": devices.use_gpu})
    return config.model_copy(update={"workers": workers})


def in_fresh_processes(workers: WorkersConfig, tasks: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """Return the result of each task, by name. Each runs in a new process with a worker's resources, which nothing of
    the training has touched.

    Raises a task's own TercetError, or TrainingError for a process that did not finish."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources = worker_resources(workers)
    # max_calls=1: the process ends after its task instead of taking another one.
    remote = ray.remote(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_calls=1, max_retries=workers.max_failures
    )(_call)
    pending = {name: remote.remote(task) for name, task in tasks.items()}
    try:
        return run_while_head_alive(lambda: {name: ray.get(reference) for name, reference in pending.items()})
    except RayTaskError as error:
        own = as_tercet_error(error.cause) if isinstance(error.cause, Exception) else error
        if isinstance(own, OutOfMemory):
            own = OutOfMemory(own.message, hint="lower evaluation.batch_size, or use machines with more memory")
        raise own if isinstance(own, TercetError) else error from None
    except RayError as error:
        raise TrainingError(
            f"{', '.join(tasks)}: a process did not finish: {first_line(error)}",
            hint="run the same command again: everything committed is kept, and only this step is repeated",
        ) from error


def _call(task: Callable[[], Result]) -> Result:
    return task()


def worker_resources(workers: WorkersConfig) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    return {"CPU": workers.cpus_per_worker, **({"GPU": 1.0} if workers.use_gpu is True else {})}


def wait_for_head(address: str) -> None:
    """Return as soon as something answers at `address`, host:port.

    Raises TrainingError after half the time that Ray gives a head to come back, and ValueError for an invalid host."""
    ends_at = time.monotonic() + _patience_seconds()
    while not _answers(address):
        if time.monotonic() > ends_at:
            raise TrainingError(
                f"no Ray cluster answers at {address} (RAY_ADDRESS)",
                hint="start its head, or unset RAY_ADDRESS to run on this machine alone",
            )
        time.sleep(POLL_SECONDS)


def run_while_head_alive(work: Callable[[], Result]) -> Result:
    """Return or raise what `work` does. It runs in a thread of its own, so that a lost head cannot block this one.

    Raises TrainingError if the head did not answer for half the time that Ray gives it. The process cannot live long
    after that: Ray ends it, with an exit code of Ray's own, when it fails to leave the lost cluster."""
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
                hint="start the cluster again, then run the same command: the run resumes from its last checkpoint",
            )
    return done.result()


def _in_thread(work: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Start a thread that, unlike an executor's, does not keep the process from ending."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the result
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
