"""The workers' process group, on one worker in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import ray.train.torch
import torch
from ray.exceptions import GetTimeoutError
from torch import distributed as dist

from tercet.cluster import process_group
from tercet.cluster.process_group import LazyTorchConfig, TorchDeviceContext, met_by_all_ranks

VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
VARIABLES += ("ACCELERATE_TORCH_DEVICE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


class Context:
    """Stands in for Ray Train's context of a lone worker."""

    get_world_rank = get_local_rank = get_node_rank = staticmethod(lambda: 0)
    get_world_size = get_local_world_size = staticmethod(lambda: 1)


class Workers:
    """Stands in for Ray Train's worker group: one worker, which runs in this process."""

    def execute_async(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [work(*arguments)]

    def execute_single(self, rank: int, work: Callable[..., Any], *arguments: Any) -> Any:
        assert rank == 0
        return work(*arguments)


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set afterwards is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray, "get", lambda value, **_: value)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_workers_join_and_leave() -> None:
    config = LazyTorchConfig("gloo", 1860)
    backend = config.backend_cls()
    backend.on_start(Workers(), config)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
    assert [os.environ[name] for name in VARIABLES[2:7]] == ["0", "1", "0", "1", "0"]
    backend.on_shutdown(Workers(), config)
    assert not dist.is_initialized()
    backend.on_shutdown(Workers(), config)  # nothing is left to do


def test_collectives_of_nccl_are_ended_before_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose collective waits for one that is gone could not leave otherwise. Shown with gloo: no GPU here."""
    config = LazyTorchConfig("gloo", 1860)
    config.backend_cls().on_start(Workers(), config)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it would wait for the collective"))
    config.backend_cls().on_shutdown(Workers(), config)
    assert not dist.is_initialized()


def test_an_error_that_all_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert met_by_all_ranks()  # without a group, there are no others
    config = LazyTorchConfig("gloo", 1860)
    config.backend_cls().on_start(Workers(), config)
    assert met_by_all_ranks()
    monkeypatch.setattr(process_group, "FINAL_ERROR_SECONDS", 0.1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert not met_by_all_ranks()
    dist.distributed_c10d._get_default_store().set("tercet/final-error/1", "met")
    assert met_by_all_ranks()


def test_workers_that_cannot_leave_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Any, timeout: float) -> None:
        assert timeout == process_group.SHUTDOWN_TIMEOUT_SECONDS
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(process_group.logger, "propagate", True)
    config = LazyTorchConfig("gloo", 1860)
    config.backend_cls().on_shutdown(Workers(), config)
    assert "did not leave their process group within 30 s" in caplog.text


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_nccl_ends_a_process_whose_collective_timed_out(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, timeout: calls.append((*arguments, timeout)))
    if given is not None:
        monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", given)
    process_group._join("nccl", 1860, "10.0.0.1", 29500)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == expected
    [(backend, timeout)] = calls
    assert (backend, timeout.total_seconds()) == ("nccl", 1860)


@pytest.mark.parametrize(("device", "chosen"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_worker_uses_its_own_gpu(device: str, chosen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    with TorchDeviceContext():
        assert calls == chosen
