"""Ray around the worker: where it runs, what it gets, how often it may fail."""

from __future__ import annotations

import logging
import os
import re
import secrets
import tempfile
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from tercet.checkpoint import Commit
from tercet.config import Config
from tercet.errors import ConfigError, OutOfMemory, PlanError, Preempted, TercetError, TrainingError, first_line
from tercet.head import wait_for_head, while_head_answers
from tercet.plan import TrainPlan
from tercet.sections import WorkersConfig
from tercet.storage import open_storage

logger = logging.getLogger("tercet")

Result = TypeVar("Result")

# The driver's environment does not reach Ray's workers by itself.
PASSED_ENVIRONMENT = ("AWS_", "HF_", "TERCET_", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "NCCL_", "GLOO_")

# How often Ray Train asks its workers for news; 2 s by default, which each report waits for.
HEALTH_CHECK_SECONDS = "0.5"

# Errors that another attempt would meet again: not worth a restart.
_FINAL_ERRORS = (TrainingError, ConfigError, PlanError)


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
    address = _address()
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


def _address() -> str:
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


def train(plan: TrainPlan) -> None:
    """Run the workers to the end, elsewhere where machines are taken away. What they made is in storage.

    Raises the worker's own TercetError; TrainingError when workers died more often than the recipe allows, or the head
    or Ray's controller did; PlanError when the cluster had no room in time."""
    owner = uuid.uuid4().hex  # all attempts are of one owner: a restart does not wait for the lease of the one before
    error: TercetError | None = None
    for _ in range(plan.config.workers.max_preemptions + 1):
        error = _fit(plan, owner)
        if not isinstance(error, Preempted):
            break
        logger.warning("%s; going on elsewhere", error)
    if error is not None:
        raise error


def _fit(plan: TrainPlan, owner: str) -> TercetError | None:
    """One run of Ray Train. Returns what all workers met and others would meet again, or a notice of preemption."""
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    from tercet.controller import ElasticTrainer, TellsOfDeadWorkers
    from tercet.torch_group import TorchGroup

    workers, sizes = plan.config.workers, plan.world_sizes
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    with tempfile.TemporaryDirectory(prefix="tercet-ray-") as folder:
        trainer = ElasticTrainer(
            _train_loop,
            world_sizes=sizes,
            own_cluster=not _address(),
            train_loop_config={"plan": plan.model_dump_json(), "owner": owner},
            backend_config=TorchGroup(backend="nccl" if workers.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),
                use_gpu=bool(workers.use_gpu),
                resources_per_worker=_resources(workers),
                elastic_resize_monitor_interval_s=workers.grow_check_seconds,
            ),
            # Ray's own bookkeeping is of this launch only: what counts is committed to storage by the workers.
            run_config=RunConfig(
                name=plan.run_id,
                storage_path=folder,
                failure_config=FailureConfig(
                    max_failures=workers.max_failures,
                    max_preemption_failures=workers.max_preemptions,
                    controller_failure_limit=1,
                ),
                callbacks=[TellsOfDeadWorkers(storage, plan.run_id)],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            result = while_head_answers(trainer.fit)
        except WorkerGroupError as error:
            raise _cause(error.worker_failures) from error
        except PreemptionError as error:
            raise Preempted(
                f"machines were taken away more than {workers.max_preemptions} times",
                hint="submit again, or raise workers.max_preemptions",
            ) from error
        except ControllerError as error:
            count = sizes[0] if len(sizes) == 1 else f"at least {sizes[0]}"
            failure = error.controller_failure
            raise PlanError(
                f"Ray Train could not start {count} workers with {_resources(workers)} each:"
                f" {first_line(getattr(failure, 'cause', failure))}",
                hint="does the cluster have the room (`ray status`)? raise workers.start_timeout_seconds if it is slow",
            ) from error
        except RayActorError as error:
            raise TrainingError(
                f"Ray Train's controller is lost: {first_line(error)}",
                hint="the same command again: the run goes on from its last checkpoint",
            ) from error
    return result.return_value if isinstance(result.return_value, TercetError) else None


def _train_loop(loop_config: dict[str, str]) -> TercetError | None:
    """What Ray runs on each worker. An error that all ranks meet, and would meet again, is returned instead of raised:
    raising makes Ray restart the workers."""
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    from tercet.worker import run_worker

    # Ray Train 2.60 logs every report to a logger named by a file path, which its own log level does not reach.
    logging.getLogger().setLevel(logging.WARNING)

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(metrics)

    def notice() -> bool:
        # Ray 2.60's public `get_preemption_info` asks an actor, with all ranks, 4 to 10 ms each time.
        return context.preemption_context.preemption_info is not None

    context = get_train_context()
    try:
        run_worker(TrainPlan.model_validate_json(loop_config["plan"]), report, loop_config["owner"], notice)
    except OutOfMemory:
        raise  # what else lay in this memory may be gone at the next start
    except _FINAL_ERRORS as error:
        return error
    return None


def _cause(failures: dict[int, Exception]) -> TercetError:
    """What to tell a person about dead workers: tercet's own error where there is one."""
    causes = {rank: getattr(error, "_base_exc", error) for rank, error in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, TercetError):
            return cause
    lines = [f"rank {rank}: {type(c).__name__}: {first_line(c)}" for rank, c in causes.items()]
    return TrainingError(
        "the workers failed more often than workers.max_failures allows:\n" + "\n".join(lines),
        hint="the workers' logs tell more (--debug, or the Ray dashboard); "
        "submitting again resumes from the last checkpoint",
    )


def evaluate_test(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    """Baseline and best on the test split."""
    from tercet.evaluation import evaluate_test as evaluate_in_process

    tasks = {name: partial(evaluate_in_process, plan, of) for name, of in {"baseline": None, "best": commit}.items()}
    return in_fresh_processes(plan.config.workers, tasks)


def in_fresh_processes(workers: WorkersConfig, tasks: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """What each task returns: each in a process of its own with a worker's resources, which has seen nothing of
    training. Raises a task's own TercetError."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    resources = _resources(workers)
    # max_calls=1: the process ends afterwards, and a new one never reuses it.
    remote = ray.remote(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_calls=1, max_retries=workers.max_failures
    )(_call)
    pending = {name: remote.remote(task) for name, task in tasks.items()}
    try:
        return while_head_answers(lambda: {name: ray.get(reference) for name, reference in pending.items()})
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, TercetError) else error from None
    except RayError as error:
        raise TrainingError(
            f"{', '.join(tasks)}: a process did not finish: {first_line(error)}",
            hint="the same command again: what is committed is kept, only this is repeated",
        ) from error


def _call(task: Callable[[], Result]) -> Result:
    return task()


def _resources(workers: WorkersConfig) -> dict[str, float]:
    return {"CPU": workers.cpus_per_worker, **({"GPU": 1.0} if workers.use_gpu is True else {})}
