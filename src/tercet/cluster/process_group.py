"""The process group of Ray Train's workers, without torch in the driver and in Ray's controller.

Ray 2.60's own TorchConfig imports torch where it is made and where it is unpacked: two seconds each, one after the
other, before the first worker begins to start. Here only the workers import torch. They do what Ray's workers do, with
public functions of Ray and torch.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

logger = logging.getLogger("tercet")

# Ray's own. After it, Ray ends the workers' processes even if they are still in the group.
SHUTDOWN_TIMEOUT_SECONDS = 30
# Ranks that stop with the same error do so at the same step, but may have to record it first.
FINAL_ERROR_SECONDS = 5.0


@dataclass
class LazyTorchConfig(BackendConfig):  # type: ignore[misc]
    """Replaces Ray's TorchConfig."""

    backend: str
    """`nccl` or `gloo`."""
    timeout_seconds: int
    """How long a rank waits for the others in a collective."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Class that sets up the process group."""
        return _TorchGroupBackend

    @property
    def train_func_context(self) -> type[TorchDeviceContext]:
        """Context that each worker enters around its work."""
        return TorchDeviceContext


class TorchDeviceContext:
    """Makes the worker's GPU, if it has one, torch's current device."""

    def __enter__(self) -> None:
        import torch
        from ray.train.torch import get_device

        device = get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def __exit__(self, *error: object) -> None:
        pass


class _TorchGroupBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: LazyTorchConfig) -> None:
        """Let all workers join; raise the error of one that cannot."""
        ray.get(worker_group.execute_async(_import))  # takes seconds, during which a free port may be taken
        address, port = worker_group.execute_single(0, _address_and_free_port)
        arguments = (backend_config.backend, backend_config.timeout_seconds, address, port)
        ray.get(worker_group.execute_async(_join, *arguments))

    def on_shutdown(self, worker_group: Any, backend_config: LazyTorchConfig) -> None:  # noqa: ARG002
        """Let the workers leave that still can."""
        try:
            ray.get(worker_group.execute_async(_leave), timeout=SHUTDOWN_TIMEOUT_SECONDS)
        except GetTimeoutError:
            logger.warning("the workers did not leave their process group within %d s", SHUTDOWN_TIMEOUT_SECONDS)


def _import() -> None:
    import_module("ray.train.torch")  # and with it torch


def _address_and_free_port() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join(backend: str, timeout_seconds: int, address: str, port: int) -> None:
    import ray.train
    import torch
    from ray.train.torch import get_device

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(get_device()),
    }
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        # As Ray sets it: a collective that times out ends the process instead of hanging.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def met_by_all_ranks() -> bool:
    """Return whether every rank has called this within FINAL_ERROR_SECONDS. It is no collective of the group, in which
    ranks without an error may be busy."""
    import torch

    if not torch.distributed.is_initialized():
        return True
    store = torch.distributed.distributed_c10d._get_default_store()
    names = [f"tercet/final-error/{rank}" for rank in range(torch.distributed.get_world_size())]
    try:
        store.set(names[torch.distributed.get_rank()], "met")
        store.wait(names, timedelta(seconds=FINAL_ERROR_SECONDS))
    except RuntimeError:  # too late, or the process of rank 0, which has the store, is gone
        return False
    return True


def _leave() -> None:
    """Leave the group. With NCCL, end this rank's collectives first: one that waits for a rank that is gone would keep
    the GPU and this process busy, while gloo raises an error at once."""
    import torch

    if not torch.distributed.is_initialized():
        return
    if "nccl" in torch.distributed.get_backend():
        torch.distributed.distributed_c10d._abort_process_group()
    else:
        torch.distributed.destroy_process_group()
