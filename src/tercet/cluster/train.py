"""Ray around the worker: where it runs, what it gets, how often it may fail."""

from __future__ import annotations

import logging
import tempfile
import uuid
from functools import partial
from typing import Any

from tercet.artifacts.checkpoint import Commit
from tercet.cluster.session import cluster_address, in_fresh_processes, run_while_head_alive, worker_resources
from tercet.errors import ConfigError, OutOfMemory, PlanError, Preempted, TercetError, TrainingError, first_line
from tercet.planning.plan import TrainPlan
from tercet.storage import open_storage

logger = logging.getLogger("tercet")


# Errors that another attempt would meet again: not worth a restart.
_FINAL_ERRORS = (TrainingError, ConfigError, PlanError)


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

    from tercet.cluster.failures import as_tercet_error
    from tercet.cluster.policies import DeadWorkerReporter, ElasticTrainer
    from tercet.cluster.process_group import LazyTorchConfig

    workers, sizes = plan.config.workers, plan.world_sizes
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    with tempfile.TemporaryDirectory(prefix="tercet-ray-") as folder:
        trainer = ElasticTrainer(
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
            # Ray's own bookkeeping is of this launch only: what counts is committed to storage by the workers.
            run_config=RunConfig(
                name=plan.run_id,
                storage_path=folder,
                failure_config=FailureConfig(
                    max_failures=workers.max_failures,
                    max_preemption_failures=workers.max_preemptions,
                    controller_failure_limit=1,
                ),
                callbacks=[DeadWorkerReporter(storage, plan.run_id)],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            result = run_while_head_alive(trainer.fit)
        except WorkerGroupError as error:
            raise as_tercet_error(error.worker_failures) from error
        except PreemptionError as error:
            raise Preempted(
                f"machines were taken away more than {workers.max_preemptions} times",
                hint="submit again, or raise workers.max_preemptions",
            ) from error
        except ControllerError as error:
            count = sizes[0] if len(sizes) == 1 else f"at least {sizes[0]}"
            failure = error.controller_failure
            raise PlanError(
                f"Ray Train could not start {count} workers with {worker_resources(workers)} each:"
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

    from tercet.training.worker import run_worker

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


def evaluate_test(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    """Baseline and best on the test split."""
    from tercet.evaluation.evaluate import evaluate_test as evaluate_in_process

    tasks = {name: partial(evaluate_in_process, plan, of) for name, of in {"baseline": None, "best": commit}.items()}
    return in_fresh_processes(plan.config.workers, tasks)
