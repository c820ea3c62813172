"""One classifier for what ended workers, on the errors that Ray 2.60 and torch 2.13 raise.

The long texts were recorded: an actor's process killed by SIGKILL, an actor ended by `ray.kill`, a raylet killed under
an actor and under a task, and ranks of a gloo group of which one was killed."""

from __future__ import annotations

import mmap
import os
from errno import ECONNREFUSED, ECONNRESET, EPIPE
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RpcError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from tercet.cluster import failures
from tercet.cluster.failures import cause_of, describe, error_of_workers, is_final, kind_of, most_telling
from tercet.errors import (
    AccessDenied,
    ConfigError,
    GpuOutOfMemory,
    LeaseLost,
    NonFiniteError,
    OutOfMemory,
    PlanError,
    StorageUnavailable,
    TrainingError,
)

PROCESS_DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
RAY_KILL = "The actor is dead because it was killed by `ray.kill`."
NODE_DIED = "The actor died because its node has died. Node Id: 5f\n\tthe actor's node was terminated unexpectedly: x"
NODE_DRAINED = "The actor is dead because its worker process has died.\n\tthe actor's node was terminated expectedly: x"
SOCKET_CLOSED = "The actor is temporarily unavailable: RpcError: RPC error: Socket closed rpc_code: 14"
REFUSED = (
    "The actor is temporarily unavailable: RpcError: RPC error: failed to connect to all addresses; last error: "
    "UNKNOWN: ipv4:10.0.0.2:42081: Failed to connect to remote host: Connection refused rpc_code: 14"
)
TASKS_NODE = "Task failed because the node it was running on is dead or unavailable. Node IP: 10.0.0.2, node ID: 4f."

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
GLOO_CLOSED = GLOO + "pair.cc:553] Connection closed by peer [127.0.0.1]:48792. This is typically caused by a remote "
GLOO_RESET = GLOO + "pair.cc:537] Read error [127.0.0.1]:7900: Connection reset by peer. This is typically caused by a "
GLOO_SILENT = GLOO + "unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"
STORE_CLOSED = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
NCCL_REMOTE = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.29\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
)
NCCL_USAGE = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage, NCCL version 2.29\nncclInvalidUsage: Duplicate GPU"
)


NCCL_CUDA = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
NCCL_MEMORY = f"{NCCL_CUDA}Cuda failure 2 'out of memory'"
NCCL_DEVICE = f"{NCCL_CUDA}Cuda failure 101 'invalid device ordinal'"


def died(text: str, **details: Any) -> ActorDiedError:
    """An actor's death as Ray's core reports it."""
    context = ActorDiedErrorContext(error_message=text, class_name="RayTrainWorker", pid=7, actor_id=b"\1" * 16)
    context.node_ip_address = "10.0.0.2"
    if details:
        context.node_death_info.CopyFrom(NodeDeathInfo(**details))
    return ActorDiedError(context)


def unanswered(failure: Exception) -> WorkerHealthCheckFailedError:
    """A worker that did not answer, as Ray Train's controller wraps it."""
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(…)", failure)


def in_task(cause: Exception) -> RayTaskError:
    """An error that a task raised, as `ray.get` raises it."""
    error = RayTaskError("poll_status", f"Traceback (most recent call last):\n{cause!r}", cause)
    return error.as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (died(PROCESS_DIED), "worker_killed"),
        (died(RAY_KILL), "worker_killed"),
        (ActorDiedError(), "worker_killed"),
        (WorkerCrashedError(), "worker_killed"),
        (died(NODE_DIED), "node_lost"),
        (died(NODE_DRAINED), "node_lost"),
        (died(PROCESS_DIED, reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED), "node_lost"),
        (RayActorError(preempted=True), "node_lost"),
        (NodeDiedError(TASKS_NODE), "node_lost"),
        (LocalRayletDiedError(), "node_lost"),
        (ActorUnavailableError(SOCKET_CLOSED, b"\1" * 16), "lost"),
        (ActorUnavailableError(REFUSED, None), "lost"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "out_of_memory"),
        (OutOfMemory("out of memory: CUDA"), "out_of_memory"),
        (GpuOutOfMemory("out of memory: CUDA"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "out_of_memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory"),
        (dist.DistBackendError(NCCL_MEMORY), "out_of_memory"),
        (dist.DistBackendError(NCCL_DEVICE), "error"),
        (StorageUnavailable("no answer: Connection reset by peer"), "storage_unavailable"),
        (LeaseLost("run r was taken over"), "taken_over"),
        (TrainingError("ranks hold different weights"), "error"),
        (RuntimeError(GLOO_CLOSED), None),
        (RuntimeError(GLOO_RESET), None),
        (RuntimeError(f"{GLOO}pair.cc:537] Write error [127.0.0.1]:1: Broken pipe"), None),
        (dist.DistNetworkError(STORE_CLOSED), None),
        (dist.DistNetworkError("The client socket has failed to connect to any network address of (h, 1)."), None),
        (dist.DistBackendError(NCCL_REMOTE), None),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), None),
        (dist.DistBackendError(NCCL_USAGE), "error"),
        (RpcError("failed to connect to all addresses", 14), None),
        (RuntimeError(GLOO_SILENT), "error"),
        (ConnectionResetError(ECONNRESET, "Connection reset by peer"), "error"),
        (ValueError("the Connection column is missing"), "error"),
        (RuntimeError("the connectionist model has no pooling"), "error"),
        (GetTimeoutError("Get timed out"), "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_kind_of_each_error(error: Exception, kind: str | None) -> None:
    wrapped = [error, unanswered(error)]
    if not isinstance(error, ActorDiedError):  # which Ray cannot pickle into an error of a task
        wrapped += [in_task(error), unanswered(in_task(error))]
    assert [kind_of(each) for each in wrapped] == [kind] * len(wrapped)
    assert {cause_of(each) for each in wrapped} == {error}


@pytest.mark.parametrize(
    ("errors", "kind", "rank"),
    [
        ([RuntimeError(GLOO_CLOSED), unanswered(died(PROCESS_DIED))], "worker_killed", 1),
        ([died(PROCESS_DIED), died(NODE_DIED)], "node_lost", 1),
        ([died(NODE_DIED), OutOfMemoryError("low on memory")], "out_of_memory", 1),
        ([ValueError("a"), ActorUnavailableError(SOCKET_CLOSED, None)], "lost", 1),
        ([RuntimeError(GLOO_CLOSED), ValueError("a"), KeyError("b")], "error", 1),
        ([TrainingError("a"), StorageUnavailable("b")], "error", 0),
        ([StorageUnavailable("b"), TrainingError("a")], "storage_unavailable", 0),
        ([RuntimeError(GLOO_CLOSED), died(PROCESS_DIED), died(PROCESS_DIED)], "worker_killed", 1),
    ],
)
def test_the_error_that_explains_the_others(errors: list[Exception], kind: str, rank: int) -> None:
    by_rank = dict(enumerate(errors))
    assert most_telling(dict(reversed(by_rank.items()))) == (kind, describe(rank, by_rank[rank]))


def test_lost_connections_alone_explain_nothing() -> None:
    assert most_telling({0: RuntimeError(GLOO_CLOSED), 1: RuntimeError(GLOO_RESET)}) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\n  rows"), "rank 3: ValueError: no rows"),
        (AccessDenied("no key", hint="get one"), "rank 3: AccessDenied: no key"),
        (
            unanswered(died(RAY_KILL)),
            f"rank 3: ActorDiedError: The actor died unexpectedly before finishing this task. {RAY_KILL}",
        ),
        (ValueError("x" * 1000), "rank 3: ValueError: " + "x" * 500),
    ],
    ids=str,
)
def test_one_line_of_an_error(error: Exception, line: str) -> None:
    assert describe(3, error) == line


def test_the_error_to_raise() -> None:
    denied = AccessDenied("no key", hint="get one")
    assert error_of_workers({1: in_task(denied), 0: RuntimeError(GLOO_CLOSED)}) is denied
    error = error_of_workers({1: unanswered(died(PROCESS_DIED)), 0: RuntimeError(GLOO_CLOSED)})
    assert type(error) is TrainingError
    _, first, second = error.message.splitlines()
    assert first.startswith("rank 0: RuntimeError: ")
    assert second.startswith("rank 1: ActorDiedError: ")
    assert PROCESS_DIED[:100] in second


def test_a_final_error_is_raised_before_any_other() -> None:
    wrong = TrainingError("no weight moved")
    assert error_of_workers({0: StorageUnavailable("gone"), 1: in_task(wrong), 2: RuntimeError(GLOO_CLOSED)}) is wrong
    full = error_of_workers({0: RuntimeError(GLOO_CLOSED), 1: torch.OutOfMemoryError("CUDA out of memory")})
    assert type(full) is GpuOutOfMemory


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (TrainingError("x"), True),
        (NonFiniteError("x"), True),
        (PlanError("x"), True),
        (ConfigError("x"), True),
        (GpuOutOfMemory("x"), True),
        (OutOfMemory("x"), False),  # other processes of the machine may have ended by then
        (OutOfMemoryError("low on memory"), False),
        (StorageUnavailable("x"), False),
        (LeaseLost("x"), False),
        (RuntimeError(GLOO_CLOSED), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("x"), False),
    ],
    ids=repr,
)
def test_which_errors_are_final(error: Exception, final: bool) -> None:
    assert is_final(error) is final
    assert is_final(unanswered(error)) is final
    assert is_final(in_task(error)) is final


def test_ray_train_unwraps_what_the_training_function_raised() -> None:
    """So there is no need to look into its private wrapper."""
    denied = AccessDenied("no key")
    status = WorkerStatus(running=False, error=UserExceptionWithTraceback(denied, "Traceback"))
    polled = WorkerGroupPollStatus({1: status})
    assert polled.errors == {1: denied}
    assert polled.get_worker_group_error().worker_failures == {1: denied}


def found_in(path: Path, text: str) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(text.encode()) >= 0


@pytest.mark.parametrize("text", [*failures.NODE_TEXTS, *failures.GLOO_TEXTS])
def test_the_texts_are_those_of_the_installed_libraries(text: str) -> None:
    ray_core = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    torch_core = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    assert found_in(ray_core if text in failures.NODE_TEXTS else torch_core, text)


def test_the_texts_of_the_operating_system() -> None:
    assert {os.strerror(number) for number in (ECONNRESET, ECONNREFUSED, EPIPE)} == {*failures.SYSTEM_TEXTS}


def test_nccls_texts_are_those_of_a_torch_with_cuda() -> None:
    nccl = Path(torch.__file__).parent / "lib/libtorch_cuda.so"
    if not nccl.exists():
        pytest.skip("this torch has no CUDA")
    assert all(found_in(nccl, text) for text in failures.NCCL_TEXTS)
