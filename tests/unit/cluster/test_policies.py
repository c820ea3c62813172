"""tercet's policies and reporter inside Ray Train's controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from tercet.artifacts import journal
from tercet.artifacts.lease import Lease
from tercet.cluster.policies import DeadWorkerReporter, ElasticTrainer, EvenWorldSizes, RetryStartupFailures
from tercet.errors import OutOfMemory, RunIsTaken, TrainingError
from tercet.storage.local import LocalStorage


@pytest.mark.parametrize(("room", "taken"), [(0, 0), (1, 0), (2, 2), (3, 2), (7, 4), (8, 8), (50, 8)])
def test_numbers_of_workers_that_share_the_batch(room: int, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}])
    policy = EvenWorldSizes(ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 2}), (2, 4, 8))
    gone = {"CPU": 8.0}
    assert policy._count_possible_workers({"a": {"CPU": 2.0 * room + 1}, "b": gone, "c": gone}) == taken


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray warns of its own settings
@pytest.mark.parametrize(("num_workers", "elastic"), [((2, 4), True), (2, False)])
def test_ray_gets_the_policy(num_workers: Any, elastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed Ray takes it at the place that is overridden."""
    got: dict[str, Any] = {}

    class Done:
        error = None

    def run(_: Any, **arguments: Any) -> Done:
        got.update(arguments)
        return Done()

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", run)
    monkeypatch.setattr("ray.train.v2.api.data_parallel_trainer.ObjectRefWrapper", lambda function: function)
    ElasticTrainer(lambda: None, world_sizes=(2, 4), scaling_config=ScalingConfig(num_workers=num_workers)).fit()
    assert isinstance(got["scaling_policy"], EvenWorldSizes) == elastic
    assert isinstance(got["failure_policy"], RetryStartupFailures)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("own_cluster", [True, False])
def test_no_cleaner_in_a_cluster_that_ends_with_the_process(own_cluster: bool) -> None:
    trainer = ElasticTrainer(lambda: None, world_sizes=(2,), own_cluster=own_cluster)
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in names) != own_cluster
    assert "BackendSetupCallback" in names


@pytest.mark.parametrize(
    ("failure", "elastic", "chances"),
    [
        (WorkerGroupStartupFailedError("it died"), False, 3),
        (RayTaskError("_join", "Connection reset by peer", RuntimeError()), False, 3),
        (WorkerGroupStartupTimeoutError(2), False, 1),
        (WorkerGroupStartupTimeoutError(2), True, 3),
    ],
)
def test_a_worker_that_dies_while_it_starts_counts_as_a_failure(
    failure: Exception, elastic: bool, chances: int
) -> None:
    policy = RetryStartupFailures(FailureConfig(max_failures=3, controller_failure_limit=1), elastic)
    decisions = [policy.make_decision(ControllerError(failure)) for _ in range(chances + 1)]
    assert decisions == [FailureDecision.RETRY] * chances + [FailureDecision.RAISE]


def test_what_would_end_the_same_is_not_retried() -> None:
    """One rank met the error; the others were still at work, or lost their connection to it."""
    policy = RetryStartupFailures(FailureConfig(max_failures=3, controller_failure_limit=1), elastic=False)
    final: dict[int, Exception] = {0: RuntimeError("Connection closed by peer"), 1: TrainingError("no weight moved")}
    assert policy.make_decision(WorkerGroupError("x", final)) == FailureDecision.RAISE
    full = WorkerGroupError("x", {0: OutOfMemory("the machine's memory")})
    assert policy.make_decision(full) == FailureDecision.RETRY


def test_a_final_error_is_recorded_by_its_rank_alone(tmp_path: Path) -> None:
    """The newest attempt may be another's: RunIsTaken is final too."""
    storage = LocalStorage(tmp_path / "s")
    lease = Lease(storage, "r", "one", 60)
    lease.begin("a", 0, 2)
    DeadWorkerReporter(storage, "r").after_exception(None, {1: RunIsTaken("another attempt is alive")})
    assert journal.counts(storage, "r") == {}


def test_a_lost_connection_alone_is_not_recorded(tmp_path: Path) -> None:
    """The next attempt records `lost` instead: the death of the rank at the other end is not known yet."""
    storage = LocalStorage(tmp_path / "s")
    lease = Lease(storage, "r", "one", 60)
    lease.begin("a", 0, 2)
    lease.release(finished=False)
    DeadWorkerReporter(storage, "r").after_exception(None, {0: RuntimeError("Connection closed by peer [10.0.0.1]")})
    assert journal.counts(storage, "r") == {}


def dead(text: str) -> Exception:
    """A worker that did not answer, as Ray Train wraps it."""
    error = RayActorError(error_msg=text)
    return WorkerHealthCheckFailedError("worker 1 died", error)


KILLED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
NODE = "The actor died because its node has died. Node Id: 5f"


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        ({0: dead(KILLED)}, "worker_killed"),
        ({0: RuntimeError("Connection closed by peer"), 1: dead(KILLED)}, "worker_killed"),
        ({0: dead(KILLED), 1: dead(NODE)}, "node_lost"),
        ({0: RayActorError(preempted=True)}, "node_lost"),
        ({0: ActorDiedError()}, "worker_killed"),
        ({0: dead(KILLED), 1: OutOfMemoryError("the node was short of memory")}, "out_of_memory"),
        ({0: ValueError("a fault")}, "error"),
        ({0: RuntimeError("Connection closed by peer"), 1: ValueError("a fault")}, "error"),
    ],
)
def test_why_an_attempt_ended(errors: dict[int, Exception], kind: str, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "s")
    DeadWorkerReporter(storage, "r").after_exception(None, errors)
    assert journal.counts(storage, "r") == {}  # no attempt had begun
    lease = Lease(storage, "r", "one", 60)
    lease.begin("a", 0, 2)
    lease.release()
    for _ in range(2):
        DeadWorkerReporter(storage, "r").after_exception(None, errors)
    assert journal.counts(storage, "r") == {kind: 1}
