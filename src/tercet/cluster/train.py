"""Run the workers under Ray Train to the end, or raise why they did not get there."""

from __future__ import annotations

import logging
import tempfile
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any

from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.journal import as_tercet_error
from tercet.cluster.session import cluster_address, in_fresh_processes, run_while_head_alive, worker_resources
from tercet.errors import (
    GpuOutOfMemory,
    OutOfMemory,
    PlanError,
    Preempted,
    StartAgain,
    TercetError,
    TrainingError,
    first_line,
)
from tercet.planning.engine_settings import collective_timeout_seconds
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage

if TYPE_CHECKING:
    from tercet.cluster.policies import ElasticTrainer

logger = logging.getLogger("tercet")

# Memory of a GPU that is neither torch's nor free: a CUDA context and NCCL's buffers take 1 to 2 GiB.
_SHARE_OF_LIBRARIES, _BYTES_OF_LIBRARIES = 0.1, 2 * 2**30


def train(plan: TrainPlan) -> None:
    """Run the workers to the end, again on other machines each time theirs are taken away. Results are in storage.

    Raises the workers' own TercetError; TrainingError if workers died more often than the recipe allows, or if the head
    or Ray's controller died; PlanError if the cluster did not have enough room in time."""
    owner = uuid.uuid4().hex  # one for all attempts: a restart need not wait for the lease of the attempt before
    error: TercetError | None = None
    for _ in range(plan.config.workers.max_preemptions + 1):
        error = _run_workers(plan, owner)
        if isinstance(error, Preempted):
            logger.warning("%s; continuing elsewhere", error)
        elif isinstance(error, StartAgain):
            logger.warning("%s; starting again", error)
        else:
            break
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
            explained = _explain(error, plan)
            if isinstance(explained, StartAgain):
                return explained
            raise explained from error
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
        backend_config=LazyTorchConfig("nccl" if workers.use_gpu else "gloo", collective_timeout_seconds(workers)),
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

    An error that all ranks meet, and would meet again, is returned, so that each rank ends in its own time. If only
    this rank meets it, it is raised: Ray then ends the other ranks, which wait for this one."""
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    from tercet.cluster.failures import is_final
    from tercet.cluster.metrics import ThroughputMetrics
    from tercet.cluster.process_group import met_by_all_ranks
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
    except Exception as error:
        own = as_tercet_error(error)
        if isinstance(own, GpuOutOfMemory) and _is_gpu_shared():
            raise OutOfMemory(f"{own.message} (other processes use this GPU too)", hint=own.hint) from error
        if isinstance(own, TercetError) and is_final(own) and met_by_all_ranks():
            return own
        if own is error:
            raise
        raise own from error
    return None


def _is_gpu_shared() -> bool:
    """Return whether other processes occupy memory of this GPU, so that it may be free at the next start: those of an
    attempt that was just killed, for example."""
    import torch

    try:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # no GPU, or no answer after an error
        return False
    other_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved()
    return bool(other_bytes > max(_SHARE_OF_LIBRARIES * total_bytes, _BYTES_OF_LIBRARIES))


def evaluate_test(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    """Return the metrics of the `baseline` and of the `best` model on the test split, each measured in a process of its
    own."""
    from tercet.evaluation.evaluate import evaluate_test as evaluate_in_process

    tasks = {name: partial(evaluate_in_process, plan, of) for name, of in {"baseline": None, "best": commit}.items()}
    return in_fresh_processes(plan.config.workers, tasks)
