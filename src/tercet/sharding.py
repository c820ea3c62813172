"""How the model lies on the ranks: set up before it is loaded, checked once it is wrapped, gathered to be saved.

The libraries fail here without an error (sentence-transformers 6.2, accelerate 1.15): on CPU, FSDP falls back to DDP,
and a sharded model is saved with empty tensors.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open

from tercet import parallelism as settings
from tercet.errors import CorruptObject, TrainingError
from tercet.sections import Parallelism


def prepare_process(parallelism: Parallelism, use_cpu: bool) -> None:
    """Before the trainer's arguments and the model are made. Does nothing for DDP and FSDP2."""
    os.environ.update(settings.environment(parallelism, use_cpu))
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


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """A model made in here is whole, also where transformers would cut it up for ZeRO-3 as it is loaded."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def check_wrapped(model: torch.nn.Module, parallelism: Parallelism, world_size: int) -> None:
    """Raises TrainingError unless the wrapped model is what the plan says."""
    found = _parallelism_of(model)
    # One rank by itself is not wrapped; under torchrun or Ray it is.
    lone = world_size == 1 and parallelism == "ddp" and found == "a lone model"
    if found != parallelism and not lone:
        raise TrainingError(
            f"the plan says parallelism {parallelism} on {world_size} workers, but the model is trained as {found}",
            hint="this is a fault of tercet or of the installed accelerate; another workers.parallelism is the way out",
        )
    if settings.shards_weights(parallelism):
        for name, parameter in model.named_parameters():
            num_elements, num_local = _sizes(parameter)
            # Whole rows of the first dimension are dealt out (FSDP2), or equal parts that are filled up (ZeRO-3).
            limit = -(-num_elements // world_size)
            if isinstance(parameter, dist.tensor.DTensor):
                limit = -(-parameter.shape[0] // world_size) * parameter[0:1].numel()
            if num_local > limit:
                raise TrainingError(
                    f"{name} is not sharded by {parallelism}: this rank holds {num_local} of {num_elements} elements",
                    hint="this is a fault of tercet or of the installed libraries",
                )


def _parallelism_of(model: torch.nn.Module) -> str:
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(model, FSDPModule):
        return "fsdp2"
    if type(model).__name__ == "DeepSpeedEngine":
        offloads = model.zero_offload_optimizer() is not None and model.zero_cpu_offload()
        return f"zero{int(model.zero_optimization_stage())}" + ("_offload" if offloads else "")
    return "a lone model"


def _sizes(parameter: Any) -> tuple[int, int]:
    """Elements of a parameter, and those that lie on this rank."""
    if hasattr(parameter, "ds_id"):
        return parameter.ds_numel, parameter.ds_tensor.ds_numel
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.numel(), parameter.to_local().numel()
    return parameter.numel(), parameter.numel()


def reshard(model: torch.nn.Module) -> None:
    """FSDP2 leaves the root's parameters gathered after an evaluation; put them back to what each rank holds."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_values(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter; no communication."""
    if hasattr(parameter, "ds_id"):
        tensor: torch.Tensor = parameter.ds_tensor.detach()
        return tensor
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.detach().to_local()
    return parameter.detach()


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole weights and buffers on rank 0's CPU, None on the others. A collective where weights are sharded: every
    rank must call it. One parameter at a time is gathered, so no device needs room for the model."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = _whole(parameter)
        if rank == 0:
            gathered[name] = value.detach().cpu().clone()
    if rank != 0:
        return None
    gathered.update({name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()})
    # FSDP2 with gradient checkpointing wraps modules, buffers' too.
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in gathered.items()}


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            tensor: torch.Tensor = parameter.data.cpu().clone()
            return tensor
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.detach().full_tensor()
    return parameter.detach()


def fill(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put gathered weights into a whole model of the same architecture.

    Raises CorruptObject when a parameter was not gathered, or not with its shape."""
    for name, parameter in model.named_parameters():
        found = weights.get(name)
        if found is None or found.shape != parameter.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise CorruptObject(
                f"{name} is {shape} among the gathered weights, and should be of shape {tuple(parameter.shape)}",
                hint="the model would be saved incomplete: this is a fault of tercet or of the installed libraries",
            )
        parameter.data.copy_(found)
    buffers = dict(model.named_buffers())
    for name, value in weights.items():
        if name in buffers:
            buffers[name].copy_(value)


def check_saved(folder: Path, model: torch.nn.Module) -> None:
    """Raises CorruptObject unless the safetensors files below `folder` hold every parameter of `model`, with its shape.
    Reads their headers alone."""
    saved: Counter[tuple[int, ...]] = Counter()
    for path in folder.rglob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved.update(tuple(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - not a dict
    missing = Counter(tuple(parameter.shape) for parameter in model.parameters()) - saved
    if missing or any(0 in shape for shape in saved):
        raise CorruptObject(
            f"{folder}: the saved model is not complete: {sum(missing.values())} tensors are missing "
            f"and {sum(count for shape, count in saved.items() if 0 in shape)} are empty",
            hint="this is a fault of tercet or of the installed libraries; the checkpoint is not committed",
        )
