"""What becomes of the error that ends one worker: returned, raised, or raised as another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import builders
from tercet.cluster.train import _is_gpu_shared, _train_loop
from tercet.errors import GpuOutOfMemory, OutOfMemory, StorageUnavailable, TercetError, TrainingError

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_WEIGHT_MOVED, SILENT, FAULT = (
    TrainingError("no weight moved"),
    StorageUnavailable("no answer"),
    ValueError("a fault"),
)
GIB = 2**30


class Context:
    @staticmethod
    def get_world_rank() -> int:
        return 0


def end_with(error: Exception, monkeypatch: pytest.MonkeyPatch, all_ranks: bool, is_shared: bool) -> TercetError | None:
    """Run a worker that ends with an error. Returns or raises what Ray gets."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("tercet.training.worker.run_worker", fail)
    monkeypatch.setattr("tercet.cluster.process_group.met_by_all_ranks", lambda: all_ranks)
    monkeypatch.setattr("tercet.cluster.train._is_gpu_shared", lambda: is_shared)
    monkeypatch.setattr("tercet.cluster.metrics.ThroughputMetrics", lambda *_: None)
    monkeypatch.setattr("ray.train.get_context", Context)
    monkeypatch.setattr("ray.train.v2._internal.execution.context.get_train_context", Context)
    return _train_loop({"plan": builders.plan().model_dump_json(), "owner": "one"})


@pytest.mark.parametrize(("error", "kind"), [(NO_WEIGHT_MOVED, TrainingError), (FULL, GpuOutOfMemory)])
def test_an_error_of_all_ranks_is_returned(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would start the workers again if it were raised, or end them while they record it."""
    assert type(end_with(error, monkeypatch, all_ranks=True, is_shared=False)) is kind


@pytest.mark.parametrize(
    ("error", "all_ranks", "is_shared", "kind"),
    [
        (NO_WEIGHT_MOVED, False, False, TrainingError),
        (FULL, False, False, GpuOutOfMemory),
        (FULL, True, True, OutOfMemory),  # what shares the GPU may be gone at the next start
        (SILENT, True, False, StorageUnavailable),
        (FAULT, True, False, ValueError),
        (MemoryError(), True, False, OutOfMemory),
    ],
    ids=repr,
)
def test_any_other_error_is_raised(
    error: Exception, all_ranks: bool, is_shared: bool, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(kind) as caught:
        end_with(error, monkeypatch, all_ranks, is_shared)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("free_gib", "own_gib", "shared"),
    [(0.5, 78.0, False), (2.0, 71.0, False), (30.0, 20.0, True), (0.1, 40.0, True)],
)
def test_whether_others_use_the_gpu(
    free_gib: float, own_gib: float, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 GiB. CUDA and NCCL hold a few that torch does not count."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(own_gib * GIB))
    assert _is_gpu_shared() is shared


def test_without_a_gpu_nobody_shares_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert _is_gpu_shared() is False
