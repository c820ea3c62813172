"""DeepSpeed's engine, where tercet reaches into it."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import torch

from tercet.config.sections import Parallelism
from tercet.planning import engine_settings
from tercet.planning import parallelism as settings


def prepare_process(parallelism: Parallelism, use_cpu: bool) -> None:
    """Before the trainer's arguments and the model are made. Does nothing for DDP and FSDP2."""
    os.environ.update(engine_settings.environment(parallelism, use_cpu))
    if not settings.is_zero(parallelism):
        return
    if "RANK" not in os.environ:  # a lone process: DeepSpeed wants a group even of one
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        lone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(lone)
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on first use, for CPUs only
    deepspeed.init_distributed("gloo" if use_cpu else "nccl", auto_mpi_discovery=False, verbose=False)


def gather_small_exactly(engine: Any) -> None:
    """ZeRO-3 keeps small parameters gathered. After a step it gathers them in fp32, but whenever a forward pass finds
    one that is not, in the type of the autocast: then what is computed with a bias depends on what came before, and a
    run that went on after a crash ended with other bits. Now it is fp32 each time."""
    optimizer = engine.optimizer
    if torch.float32 in getattr(optimizer, "ipg_buckets", ()):  # where it can reduce gradients of that type
        for parameter in getattr(optimizer, "persistent_parameters", ()):
            if hasattr(parameter, "comm_dtype"):
                parameter.comm_dtype = torch.float32


class OneReduction:
    """In place of accelerate's DeepSpeedEngineWrapper, for losses that run several backward passes a micro-batch.

    DeepSpeed reduces gradients in each backward pass: with such a loss ZeRO-2 crashes and ZeRO-3 is silently wrong.
    Here they add up on each rank, and are reduced once, before the step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        # Called for each gradient that enters the model. DeepSpeed takes the loss's own passes for a user's, and
        # divides by gradient_accumulation_steps what transformers divided already.
        engine._backward_prologue_per_tensor = lambda gradient: gradient
        self._open: contextlib.ExitStack | None = None

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Called by accelerate for each micro-batch; `sync_gradients` on the last one of a step."""
        if self._open is None:
            self._open = contextlib.ExitStack()
            self._open.enter_context(self.engine.coalesce_grad_reduction())
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._open.close()
            self._open = None
            self.engine.set_gradient_accumulation_boundary(is_boundary=True)  # closing went back to the first one's
            self.engine.step()

    def get_global_grad_norm(self) -> Any:
        """As a plain number."""
        norm = self.engine.get_global_grad_norm()
        return norm.item() if hasattr(norm, "item") else norm
