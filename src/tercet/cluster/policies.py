"""What tercet has to say in Ray Train's controller: how many workers it takes, and what is told when some die."""

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
from tercet.cluster.failures import most_telling
from tercet.errors import StorageError
from tercet.storage import Storage


class EvenWorldSizes(ElasticScalingPolicy):  # type: ignore[misc]
    """Takes only numbers of workers that share the global batch evenly, and no node that is gone: Ray 2.60 looks every
    20 s, and for a worker on a lost node it would wait until the start times out."""

    def __init__(self, scaling_config: ScalingConfig, world_sizes: tuple[int, ...]) -> None:
        super().__init__(scaling_config)
        self._world_sizes = world_sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Of Ray 2.60: for how many workers there is room, which may be any number."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        there = {node: resources for node, resources in reserved_resources.items() if node in alive}
        room = super()._count_possible_workers(there)
        return max((size for size in self._world_sizes if size <= room), default=0)


class RetryStartupFailures(DefaultFailurePolicy):  # type: ignore[misc]
    """Counts a worker that dies while it starts like one that dies later, and so the error of another that waited for
    it. Ray counts the one like a cluster without room, which has only one more chance, and ends at the other: a long
    run would end at an unlucky moment."""

    def __init__(self, failure_config: FailureConfig, elastic: bool) -> None:
        """elastic: starts only as many workers as there is room for. That one finds none is the loss of a node."""
        super().__init__(failure_config)
        lost = (WorkerGroupStartupFailedError, RayTaskError)
        self._lost = (*lost, WorkerGroupStartupTimeoutError) if elastic else lost

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Of Ray 2.60."""
        failure = getattr(training_failed_error, "controller_failure", None)
        if isinstance(failure, self._lost):
            return super().make_decision(WorkerGroupError(str(failure), {0: failure}))
        return super().make_decision(training_failed_error)


class ElasticTrainer(DataParallelTrainer):  # type: ignore[misc]
    """On one of several numbers of workers."""

    def __init__(self, *args: Any, world_sizes: tuple[int, ...], own_cluster: bool = False, **kwargs: Any) -> None:
        """own_cluster: that ends with this process."""
        super().__init__(*args, **kwargs)
        self._world_sizes, self._own_cluster = world_sizes, own_cluster

    def _create_default_callbacks(self) -> list[Any]:
        """Of Ray 2.60. Without a process that looks every second whether resources of a dead controller are to be given
        back: they are the cluster's, and end with it."""
        callbacks = super()._create_default_callbacks()
        return [
            each for each in callbacks if not (self._own_cluster and isinstance(each, PlacementGroupCleanerCallback))
        ]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """Of Ray 2.60: gets the two policies, for which there is no public way."""
        elastic = self.scaling_config.elasticity_enabled
        arguments["failure_policy"] = RetryStartupFailures(self.run_config.failure_config, elastic)
        if elastic:
            arguments["scaling_policy"] = EvenWorldSizes(self.scaling_config, self._world_sizes)
        return super()._initialize_and_run_controller(**arguments)


class DeadWorkerReporter(UserCallback):  # type: ignore[misc]
    """Writes down why an attempt ended, for workers that could not do it themselves."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._run_id = storage, run_id

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called by Ray with the error of each rank that has one."""
        if (incident := most_telling(worker_exceptions)) is None:
            return  # a rank died whose death is not known yet: the next attempt records that this one was lost
        try:
            attempts = read_attempts(self._storage, self._run_id)
        except StorageError:
            return  # likewise
        if attempts:
            name = journal.end_name(attempts[-1].generation)
            journal.report_incident(self._storage, self._run_id, name, *incident)
