"""The process group of Ray Train's workers, without torch in the driver and in Ray's controller.

Ray 2.60's own TorchConfig imports torch where it is made and where it is unpacked, two seconds each, one after the
other, before the first worker begins to start. Here only workers import it, and do there what Ray does.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

logger = logging.getLogger("tercet")

# As Ray's own: the workers' processes end after it in any case.
SHUTDOWN_SECONDS = 30


@dataclass
class LazyTorchConfig(BackendConfig):  # type: ignore[misc]
    """In the place of TorchConfig."""

    backend: str
    """nccl or gloo."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets it up."""
        return _TorchGroupBackend

    @property
    def train_func_context(self) -> type[TorchDeviceContext]:
        """Entered by each worker around its work."""
        return TorchDeviceContext

    @property
    def framework(self) -> TrainingFramework:
        """For Ray's dashboard."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Likewise."""
        return asdict(self)


class TorchDeviceContext:
    """Ray's own context, imported where it is entered."""

    def __enter__(self) -> None:
        from ray.train.torch.config import TorchConfigContextManager

        self._context = TorchConfigContextManager()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._context.__exit__(*error)


class _TorchGroupBackend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: LazyTorchConfig) -> None:
        """All workers join, or an error is raised."""
        ray.get(worker_group.execute_async(_import))  # takes seconds, in which a free port need not stay free
        address, port = worker_group.execute_single(0, get_address_and_port)
        joining = (backend_config.backend, len(worker_group), address, port)
        ray.get([worker_group.execute_single_async(rank, _join, rank, *joining) for rank in range(len(worker_group))])

    def on_shutdown(self, worker_group: Any, backend_config: LazyTorchConfig) -> None:  # noqa: ARG002
        """All workers leave, those that can."""
        try:
            ray.get(worker_group.execute_async(_leave, len(worker_group) > 1), timeout=SHUTDOWN_SECONDS)
        except GetTimeoutError:
            logger.warning("the workers did not leave their process group within %d s", SHUTDOWN_SECONDS)


def _import() -> None:
    import_module("ray.train.torch.config")  # and so torch


def _join(rank: int, backend: str, world_size: int, address: str, port: int) -> None:
    import os

    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, world_size, "env://")


def _leave(there_is_a_group: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=there_is_a_group)
