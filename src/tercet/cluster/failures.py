"""What ended Ray's workers: the kind of incident, one line for the journal, and the error to raise.

Ray and torch distinguish some causes only by text. The texts below are those of Ray 2.60 and torch 2.13;
`tests/unit/cluster/test_failures.py` looks them up in the installed libraries.
"""

from __future__ import annotations

import re

from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RpcError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from tercet.artifacts import journal
from tercet.errors import ConfigError, GpuOutOfMemory, OutOfMemory, PlanError, TercetError, TrainingError

# Where several workers fail at once, the first of these kinds explains the others.
_MOST_TELLING = ("out_of_memory", "node_lost", "worker_killed", "lost")

MAX_CHARACTERS = 500

# Ray's core, about an actor whose machine is gone. It has no field for that.
NODE_TEXTS = ("The actor died because its node has died", "the actor's node was terminated")

# gloo and the rendezvous store of torch.distributed; NCCL; the operating system's texts that they pass on.
GLOO_TEXTS = ("Connection closed by peer", "Connection was likely closed", "failed to connect to any network address")
NCCL_TEXTS = ("ncclRemoteError", "NCCL communicator was aborted")
SYSTEM_TEXTS = ("Connection reset by peer", "Connection refused", "Broken pipe")
_LOST_PEER = re.compile("|".join((*GLOO_TEXTS, *NCCL_TEXTS, *SYSTEM_TEXTS)))


# A retry cannot help against these.
_FINAL_ERRORS = (TrainingError, ConfigError, PlanError)


def is_final(error: Exception) -> bool:
    """Return whether the workers would meet an error again at their next start.

    Memory of the machine may be free by then; a GPU's is the worker's own."""
    cause = cause_of(error)
    if isinstance(cause, OutOfMemory):
        return isinstance(cause, GpuOutOfMemory)
    return isinstance(cause, _FINAL_ERRORS)


def cause_of(error: Exception) -> Exception:
    """Return the error inside Ray's wrappers: what the worker raised, or what Ray knows about its death."""
    while True:
        if isinstance(error, WorkerHealthCheckFailedError):
            error = error.health_check_failure
        elif isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            error = error.cause
        else:
            return error


def kind_of(error: Exception) -> str | None:
    """Return the kind of incident of one worker's error; None where the worker only lost its connection to a process
    that died, whose own error explains more."""
    cause = journal.as_tercet_error(cause_of(error))
    if isinstance(cause, TercetError):
        return journal.kind_of(cause) or "error"
    if isinstance(cause, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(cause, NodeDiedError | LocalRayletDiedError):
        return "node_lost"
    if isinstance(cause, ActorUnavailableError):
        return "lost"  # Ray does not know yet whether the process died or its machine
    if isinstance(cause, RayActorError):
        is_node = cause.preempted or any(text in str(cause) for text in NODE_TEXTS)
        return "node_lost" if is_node else "worker_killed"
    if isinstance(cause, WorkerCrashedError):
        return "worker_killed"
    # torch raises RuntimeError or a subclass of it. An OSError is about another connection, such as to a model hub.
    if isinstance(cause, RpcError) or (isinstance(cause, RuntimeError) and _LOST_PEER.search(str(cause))):
        return None
    return "error"


def most_telling(errors: dict[int, Exception]) -> tuple[str, str] | None:
    """Return kind and message of the error that explains why an attempt ended, given the error of each failed rank.

    None where all of them only lost a connection."""
    kinds = {rank: kind for rank, error in sorted(errors.items()) if (kind := kind_of(error)) is not None}
    if not kinds:
        return None
    order = (*_MOST_TELLING, *kinds.values())
    rank = min(kinds, key=lambda rank: order.index(kinds[rank]))
    return kinds[rank], describe(rank, errors[rank])


def describe(rank: int, error: Exception) -> str:
    """Return one line of at most 500 characters and the name of the type, such as `rank 1: ValueError: no rows`."""
    cause = cause_of(error)
    lines = (cause.message if isinstance(cause, TercetError) else str(cause)).splitlines()
    if isinstance(cause, RayActorError):
        lines = [line for line in lines if not line.startswith("\t")]  # class_name, actor_id, pid, namespace, ip
    return f"rank {rank}: {type(cause).__name__}: {' '.join(' '.join(lines).split())[:MAX_CHARACTERS]}"


def error_of_workers(errors: dict[int, Exception]) -> TercetError:
    """Return the error to raise for workers that failed for good: the first rank's own TercetError, one that is final
    before any other; else a TrainingError that lists what happened on each rank."""
    for _, error in sorted(errors.items(), key=lambda item: (not is_final(item[1]), item[0])):
        if isinstance(cause := journal.as_tercet_error(cause_of(error)), TercetError):
            return cause
    lines = [describe(rank, error) for rank, error in sorted(errors.items())]
    return TrainingError(
        "the workers failed more often than workers.max_failures allows:\n" + "\n".join(lines),
        hint="their logs explain more (--debug, or the Ray dashboard); submit again to resume from the last checkpoint",
    )
