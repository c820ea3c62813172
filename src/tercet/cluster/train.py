"""Run the workers under Ray Train to the end, or raise why they did not get there."""

from __future__ import annotations

import logging
import tempfile
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from tercet.artifacts.checkpoint import Commit
from tercet.cluster.session import cluster_address, in_fresh_processes, run_while_head_alive, worker_resources
from tercet.errors import ConfigError, OutOfMemory, PlanError, Preempted, TercetError, TrainingError, first_line
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage

if TYPE_CHECKING:
    from tercet.cluster.policies import ElasticTrainer

logger = logging.getLogger("tercet")

# A retry cannot help against these.
_FINAL_ERRORS = (TrainingError, ConfigError, PlanError)


def train(plan: TrainPlan) -> None:
    """Run the workers to the end, again on other machines each time theirs are taken away. Results are in storage.

    Raises the workers' own TercetError; TrainingError if workers died more often than the recipe allows, or if the head
    or Ray's controller died; PlanError if the cluster did not have enough room in time."""
    owner = uuid.uuid4().hex  # one for all attempts: a restart need not wait for the lease of the attempt before
    error: TercetError | None = None
    for _ in range(plan.config.workers.max_preemptions + 1):
        error = _run_workers(plan, owner)
        if not isinstance(error, Preempted):
            break
        logger.warning("%s; continuing elsewhere", error)
    if error is not None:
        raise error


def _run_workers(plan: TrainPlan, owner: str) -> TercetError | None:
    """Run Ray Train once. Return the error that all workers met and would meet again, if any, or the notice of
    preemption after which they stopped."""
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    # Ray's own bookkeeping ends with this call; the workers commit everything that lasts to storage.
    with tempfile.TemporaryDirectory(prefix="tercet-ray-") as ray_dir:
        trainer = _trainer(plan, owner, ray_dir)
        try:
            result = run_while_head_alive(trainer.fit)
        except (WorkerGroupError, PreemptionError, ControllerError, RayActorError) as error:
            raise _explain(error, plan) from error
    return result.return_value if isinstance(result.return_value, TercetError) else None


def _trainer(plan: TrainPlan, owner: str, ray_dir: str) -> ElasticTrainer:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    from tercet.cluster.policies import DeadWorkerReporter, ElasticTrainer
    from tercet.cluster.process_group import LazyTorchConfig

    workers, sizes = plan.config.workers, plan.world_sizes
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    return ElasticTrainer(
        _train_loop,
        world_sizes=sizes,
        own_cluster=not cluster_address(),
        train_loop_config={"plan": plan.model_dump_json(), "owner": owner},
        backend_config=LazyTorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=sizes[0] if len(sizes) == 1 else (sizes[0], sizes[-1]),
            use_gpu=bool(workers.use_gpu),
            resources_per_worker=worker_resources(workers),
            elastic_resize_monitor_interval_s=workers.grow_check_seconds,
        ),
        run_config=RunConfig(
            name=plan.run_id,
            storage_path=ray_dir,
            failure_config=FailureConfig(
                max_failures=workers.max_failures,
                max_preemption_failures=workers.max_preemptions,
                controller_failure_limit=1,
            ),
            callbacks=[DeadWorkerReporter(storage, plan.run_id)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _explain(error: Exception, plan: TrainPlan) -> TercetError:
    """Return the error to raise for what `Trainer.fit` raised."""
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    from tercet.cluster.failures import cause_of, error_of_workers

    workers, sizes = plan.config.workers, plan.world_sizes
    if isinstance(error, WorkerGroupError):
        return error_of_workers(error.worker_failures)
    if isinstance(error, PreemptionError):
        return Preempted(
            f"machines were taken away more than {workers.max_preemptions} times",
            hint="submit again, or raise workers.max_preemptions",
        )
    if isinstance(error, ControllerError):
        num_workers = sizes[0] if len(sizes) == 1 else f"at least {sizes[0]}"
        return PlanError(
            f"Ray Train could not start {num_workers} workers with {worker_resources(workers)} each:"
            f" {first_line(cause_of(error.controller_failure))}",
            hint="does the cluster have enough room (`ray status`)? If it is slow, raise workers.start_timeout_seconds",
        )
    return TrainingError(
        f"Ray Train's controller is lost: {first_line(error)}",
        hint="run the same command again: the run resumes from its last checkpoint",
    )


def _train_loop(loop_config: dict[str, str]) -> TercetError | None:
    """Run one worker, in a process of Ray's.

    An error that all ranks meet, and would meet again, is returned: if it were raised, Ray would restart the
    workers."""
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    from tercet.cluster.metrics import ThroughputMetrics
    from tercet.training.worker import run_worker

    # Ray Train 2.60 logs every report to a logger named by a file path, which its own log level does not reach.
    logging.getLogger().setLevel(logging.WARNING)

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report(metrics)

    def is_preempted() -> bool:
        # The public `ray.train.get_preemption_info` is a collective of all ranks, 4 to 10 ms for each step.
        return context.preemption_context.preemption_info is not None

    context = get_train_context()
    try:
        plan = TrainPlan.model_validate_json(loop_config["plan"])
        export = ThroughputMetrics(plan.run_id, ray.train.get_context().get_world_rank())
        run_worker(plan, report, loop_config["owner"], is_preempted, export)
    except OutOfMemory:
        raise  # whatever else occupied this memory may be gone at the next start
    except _FINAL_ERRORS as error:
        return error
    return None


def evaluate_test(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    """Return the metrics of the `baseline` and of the `best` model on the test split, each measured in a process of its
    own."""
    from tercet.evaluation.evaluate import evaluate_test as evaluate_in_process

    tasks = {name: partial(evaluate_in_process, plan, of) for name, of in {"baseline": None, "best": commit}.items()}
    return in_fresh_processes(plan.config.workers, tasks)
