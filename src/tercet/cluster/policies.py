"""Scaling and failure policies inside Ray Train's controller, and the reporter of dead workers.

The policies override private methods of Ray 2.60, which has no public way to replace them:
docs/decisions/0017-private-names.md.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, ScalingConfig, UserCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from tercet.artifacts import journal
from tercet.artifacts.lease import read_attempts
from tercet.cluster.failures import is_final, most_telling
from tercet.errors import StorageError
from tercet.storage import Storage


class EvenWorldSizes(ElasticScalingPolicy):  # type: ignore[misc]
    """Scales only to numbers of workers that share the global batch evenly, and never counts a node that is gone.

    Ray 2.60 looks at the nodes every 20 s, and would wait for a worker on a lost node until the start times out."""

    def __init__(self, scaling_config: ScalingConfig, world_sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._world_sizes = world_sizes

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        """Return how many workers can start. Ray would return any number for which there is room.

        reserved_resources: by node ID."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        room = super()._count_possible_workers(
            {node: resources for node, resources in reserved_resources.items() if node in alive}
        )
        return max((size for size in self._world_sizes if size <= room), default=0)


class RetryStartupFailures(DefaultFailurePolicy):  # type: ignore[misc]
    """Counts a worker that dies while it starts like one that dies later, and retries nothing that would end the same.

    Ray treats the death as a lack of room in the cluster, which gets one more chance, and the error of another worker
    that waited for the dead one as final. A long run would end because of an unlucky moment."""

    def __init__(self, failure_config: FailureConfig, elastic: bool) -> None:
        """elastic: a start takes only as many workers as there is room for, so one that times out has lost a node."""
        super().__init__(failure_config)
        startup_failures = (WorkerGroupStartupFailedError, RayTaskError)
        self._retried = (*startup_failures, WorkerGroupStartupTimeoutError) if elastic else startup_failures

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        if any(is_final(error) for error in getattr(training_failed_error, "worker_failures", {}).values()):
            return FailureDecision.RAISE
        failure = getattr(training_failed_error, "controller_failure", None)
        if isinstance(failure, self._retried):
            return super().make_decision(WorkerGroupError(str(failure), {0: failure}))
        return super().make_decision(training_failed_error)


class ElasticTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Trains with tercet's two policies, on one of several numbers of workers."""

    def __init__(self, *args: Any, world_sizes: tuple[int, ...], own_cluster: bool = False, **kwargs: Any) -> None:
        """own_cluster: the cluster ends with this process."""
        super().__init__(*args, **kwargs)
        self._world_sizes, self._own_cluster = world_sizes, own_cluster

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray's callbacks, without the cleaner of placement groups where the cluster ends with this process.

        Every second the cleaner looks for the controller in the cluster that `ray.util.state` finds on this machine.
        Beside the cluster of another process that may be the wrong one: the cleaner ends with a traceback, or takes
        the controller for dead and removes the workers."""
        callbacks: list[Any] = super()._create_default_callbacks()
        if not self._own_cluster:
            return callbacks
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        elastic = self.scaling_config.elasticity_enabled
        arguments["failure_policy"] = RetryStartupFailures(self.run_config.failure_config, elastic)
        if elastic:
            arguments["scaling_policy"] = EvenWorldSizes(self.scaling_config, self._world_sizes)
        return super()._initialize_and_run_controller(**arguments)


class DeadWorkerReporter(UserCallback):  # type: ignore[misc]
    """Records why an attempt ended, for workers that could not do it themselves."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._run_id = storage, run_id

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Record the error that explains the others. Ray calls this with the error of each failed rank."""
        if any(is_final(error) for error in worker_exceptions.values()):
            return  # the rank that met it has recorded it
        if (incident := most_telling(worker_exceptions)) is None:
            return  # a rank's death is not known yet: the next attempt records that this one was lost
        try:
            attempts = read_attempts(self._storage, self._run_id)
        except StorageError:
            return  # likewise
        if attempts:
            name = journal.end_name(attempts[-1].generation)
            journal.report_incident(self._storage, self._run_id, name, *incident)
