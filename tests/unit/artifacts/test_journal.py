"""Incidents: reported once, by the nearest process, and counted by kind."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tercet.artifacts import journal
from tercet.errors import (
    AccessDenied,
    BatchTooLarge,
    ConfigError,
    DiskFull,
    GpuOutOfMemory,
    LearnedNothing,
    LeaseLost,
    NonFiniteError,
    OutOfMemory,
    PlanError,
    Preempted,
    StartAgain,
    StorageUnavailable,
    TercetError,
)
from tercet.storage.local import LocalStorage


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "storage")


def test_an_attempt_has_one_end(storage: LocalStorage) -> None:
    assert journal.counts(storage, "r") == {}
    journal.report_incident(storage, "r", journal.end_name(1), "hung", "rank 1 hung for 8 s")
    journal.report_incident(storage, "r", journal.end_name(1), "lost", "it ended without a word")
    journal.report_incident(storage, "r", journal.end_name(2), "hung", "rank 0 hung for 8 s")
    journal.report_incident(storage, "r", "0002-skipped-4", "checkpoint_skipped", "damaged")
    journal.report_incident(storage, "other", journal.end_name(1), "lost", "")
    assert journal.counts(storage, "r") == {"checkpoint_skipped": 1, "hung": 2}


def test_an_unreadable_incident_counts_too(storage: LocalStorage) -> None:
    storage.put("runs/r/incidents/0001-end.json", b"{")
    storage.put("runs/r/incidents/.DS_Store", b"of a file manager")
    assert journal.counts(storage, "r") == {"unreadable": 1}


def test_a_warning_if_storage_fails_too(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(key: str, data: bytes) -> None:
        raise StorageUnavailable(f"no answer for {key} of {len(data)} bytes")

    monkeypatch.setattr(storage, "put_if_absent", fails)
    with caplog.at_level(logging.WARNING, logger="tercet"):
        journal.report_incident(storage, "r", "0001-end", "hung", "rank 1 hung for 8 s")
    assert "hung (rank 1 hung for 8 s): no answer for runs/r/incidents/0001-end.json" in caplog.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemory("x"), "out_of_memory"),
        (BatchTooLarge("x"), "out_of_memory"),
        (StartAgain("x"), "out_of_memory"),
        (DiskFull("x"), "disk_full"),
        (NonFiniteError("x"), "non_finite"),
        (LearnedNothing("x"), "learned_nothing"),
        (Preempted("x"), "preempted"),
        (LeaseLost("x"), "taken_over"),
        (AccessDenied("x"), "access_denied"),
        (StorageUnavailable("x"), "storage_unavailable"),
        (PlanError("x"), None),
        (RuntimeError("Connection closed by peer"), None),  # of a rank beside the one that died
    ],
)
def test_the_kind_of_an_error(error: Exception, kind: str | None) -> None:
    assert journal.kind_of(error) == kind


NCCL_CUDA = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), GpuOutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"), GpuOutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), GpuOutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), GpuOutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GpuOutOfMemory),
        (RuntimeError("Triton Error [CUDA]: out of memory"), GpuOutOfMemory),
        (torch.distributed.DistBackendError(f"{NCCL_CUDA}Cuda failure 2 'out of memory'"), GpuOutOfMemory),
        (torch.distributed.DistBackendError(f"{NCCL_CUDA}Failed to CUDA calloc 608 bytes"), OutOfMemory),
        (torch.distributed.DistBackendError(f"{NCCL_CUDA}Cuda failure 'invalid device ordinal'"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("Triton Error: out of resource: shared memory, Required: 1, Hardware limit: 0"), None),
        (ValueError("the shop is out of memory cards"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemory),
        (RuntimeError("std::bad_alloc"), OutOfMemory),
        (RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set"), ConfigError),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), OutOfMemory),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), DiskFull),
        (RuntimeError("basic_ios::clear: iostream error"), DiskFull),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("x"), None),
    ],
    ids=str,
)
def test_errors_of_memory_and_disk_are_recognised(error: Exception, wanted: type[TercetError] | None) -> None:
    own = journal.as_tercet_error(error)
    assert type(own) is (wanted or type(error))
    assert (own is error) == (wanted is None)


def test_shared_memory_that_is_full() -> None:
    """NCCL's message comes after one about its source. No larger disk would help."""
    line = "Error while creating shared memory segment /dev/shm/nccl-a1 (size 9637888), error: No space left on device"
    own = journal.as_tercet_error(RuntimeError(f"NCCL error in: x.cpp:1, unhandled system error\nLast error:\n{line}"))
    assert isinstance(own, DiskFull)
    assert own.message == f"the shared memory of this machine is full: {line}"
    assert "--shm-size" in own.hint


def test_the_line_that_names_the_cause_is_shown() -> None:
    error = RuntimeError(f"{NCCL_CUDA}Cuda failure 2 'out of memory'")
    assert str(journal.as_tercet_error(error)) == "out of memory: Cuda failure 2 'out of memory'"


def test_an_impossible_allocation() -> None:
    """The message is that of the installed torch."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert isinstance(journal.as_tercet_error(caught.value), OutOfMemory)
