"""Everything that tercet changes in DeepSpeed's engine."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from typing import Any

import torch

from tercet.config.sections import Parallelism
from tercet.planning import engine_settings
from tercet.planning import parallelism as settings


def prepare_process(
    parallelism: Parallelism, use_cpu: bool, timeout_seconds: int = engine_settings.MIN_COLLECTIVE_SECONDS
) -> None:
    """Set this process up for DeepSpeed, before the trainer's arguments and the model are made.

    Does nothing for DDP and FSDP2."""
    os.environ.update(engine_settings.environment(parallelism, use_cpu))
    if not settings.is_zero(parallelism):
        return
    if "RANK" not in os.environ:  # a single process: DeepSpeed needs a process group even so
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(lone)
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use, for CPUs only
    deepspeed.init_distributed(
        "gloo" if use_cpu else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )


def gather_small_exactly(engine: Any) -> None:
    """Make ZeRO-3 gather small parameters in fp32 at all times.

    It keeps them gathered. After a step it gathers them in fp32, but in the type of the autocast when a forward pass
    finds one that is not gathered. Results would then depend on what ran before, and a run that resumed after a crash
    ended with other bits."""
    optimizer = engine.optimizer
    if torch.float32 in getattr(optimizer, "ipg_buckets", ()):  # where it can reduce gradients of that type
        for parameter in getattr(optimizer, "persistent_parameters", ()):
            if hasattr(parameter, "comm_dtype"):
                parameter.comm_dtype = torch.float32


class OneReduction:
    """Replaces accelerate's DeepSpeedEngineWrapper for losses that run several backward passes per micro-batch.

    DeepSpeed reduces gradients in each backward pass. With such a loss, ZeRO-2 crashes and ZeRO-3 is silently wrong.
    Here gradients add up on each rank, and are reduced once, before the step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        # Called for each gradient that enters the model. DeepSpeed takes the loss's own backward passes for calls by a
        # user, and would divide by gradient_accumulation_steps what transformers has divided already.
        engine._backward_prologue_per_tensor = lambda gradient: gradient
        self._open: contextlib.ExitStack | None = None

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Run the backward pass of a micro-batch, and the optimizer step after the last one (`sync_gradients`)."""
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._open.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._open.close()
            self._open = None
            self.engine.set_gradient_accumulation_boundary(is_boundary=True)  # closing restored the first pass's value
            self.engine.step()

    def get_global_grad_norm(self) -> Any:
        """Return the norm of all gradients as a Python number."""
        norm = self.engine.get_global_grad_norm()
        return norm.item() if hasattr(norm, "item") else norm
