"""Checks how the weights of a wrapped model are distributed over ranks, and gathers them to be saved.

The libraries fail here without an error (sentence-transformers 6.2, accelerate 1.15): on a CPU, FSDP falls back to DDP,
and a sharded model is saved with empty tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from tercet.config.sections import Parallelism
from tercet.errors import ConfigError, TrainingError
from tercet.planning import parallelism as settings


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Inside the block, transformers loads whole models, also while ZeRO-3 would make it load shards."""
    from transformers.integrations import deepspeed

    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of an encoder: the modules with parameters of each outermost ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    nested = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    return [
        layer for outer in lists if id(outer) not in nested for layer in outer if any(True for _ in layer.parameters())
    ]


def unit_classes(model: torch.nn.Module) -> list[str]:
    """Return the classes of modules that FSDP2 shall gather one at a time, by name: layers, and the embeddings' module.

    accelerate 1.15 would read the model's `_no_split_modules`, which is empty in sentence-transformers 6.2. The whole
    model would be gathered at once, without a warning."""
    units = layers(model)
    encoder = getattr(model, "transformers_model", None)
    if encoder is not None:
        table = encoder.get_input_embeddings()
        holder = next(module for module in encoder.modules() if any(child is table for child in module.children()))
        num_uses = sum(p is table.weight for _, p in model.named_parameters(remove_duplicate=False))
        if not layers(holder):
            units.append(holder)
        elif num_uses == 1:  # a tied table cannot belong to two units
            units.append(table)
    return sorted({type(unit).__name__ for unit in units})


def check_wrapped(model: torch.nn.Module, parallelism: Parallelism, world_size: int) -> None:
    """Check that the wrapped model has the plan's parallelism. Raises TrainingError if not."""
    wrapped_as = _parallelism_of(model)
    # A single process is not wrapped; a single rank under torchrun or Ray is.
    lone = world_size == 1 and parallelism == "ddp" and wrapped_as == "a lone model"
    if wrapped_as == "DataParallel":
        raise TrainingError(
            "one process would train on several GPUs, which no plan asks for",
            hint="start one process per GPU with torchrun, or name one GPU in CUDA_VISIBLE_DEVICES",
        )
    if wrapped_as != parallelism and not lone:
        raise TrainingError(
            f"the plan says parallelism {parallelism} on {world_size} workers, but the model runs as {wrapped_as}",
            hint="this is a fault of tercet or of the installed accelerate; choose another workers.parallelism",
        )
    if parallelism == "fsdp2" and any(not isinstance(layer, FSDPModule) for layer in layers(model)):
        raise TrainingError(
            "fsdp2 would gather the whole model at once: its layers are not wrapped one by one",
            hint="this is a fault of tercet or of the installed accelerate; choose zero3, which gathers layer by layer",
        )
    if settings.shards_weights(parallelism):
        for name, parameter in model.named_parameters():
            num_elements, num_local = _sizes(parameter)
            # FSDP2 distributes whole rows of the first dimension, ZeRO-3 equal parts of which the last is padded.
            limit = -(-num_elements // world_size)
            if isinstance(parameter, dist.tensor.DTensor):
                limit = -(-parameter.shape[0] // world_size) * parameter[0:1].numel()
            if num_local > limit:
                raise TrainingError(
                    f"{name} is not sharded by {parallelism}: this rank holds {num_local} of {num_elements} elements",
                    hint="this is a fault of tercet or of the installed libraries",
                )


def check_recomputes(model: torch.nn.Module) -> None:
    """Check that at least one module does gradient checkpointing. Raises ConfigError if none does.

    sentence-transformers 6.2 silently skips modules that do not support it."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            "training.gradient_checkpointing: nothing in this model supports it, so no memory would be saved",
            hint="omit it; training.gradient_accumulation_steps lowers the memory of activations too",
        )


def _parallelism_of(model: torch.nn.Module) -> str:
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(model, FSDPModule):
        return "fsdp2"
    if type(model).__name__ == "DeepSpeedEngine":
        offloads = model.zero_offload_optimizer() is not None and model.zero_cpu_offload()
        return f"zero{int(model.zero_optimization_stage())}" + ("_offload" if offloads else "")
    return "DataParallel" if isinstance(model, torch.nn.DataParallel) else "a lone model"


def _sizes(parameter: Any) -> tuple[int, int]:
    """Return the number of elements of a parameter, and how many of them this rank holds."""
    if hasattr(parameter, "ds_id"):
        return parameter.ds_numel, parameter.ds_tensor.ds_numel
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.numel(), parameter.to_local().numel()
    return parameter.numel(), parameter.numel()


def reshard(model: torch.nn.Module) -> None:
    """Return FSDP2's parameters to what each rank holds.

    After an evaluation, FSDP2 leaves those of the root gathered, and in 16 bits if it trains in them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_values(parameter: Any) -> torch.Tensor:
    """Return the part of a parameter that this rank holds. Not a collective."""
    if hasattr(parameter, "ds_id"):
        tensor: torch.Tensor = parameter.ds_tensor.detach()
        return tensor
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.detach().to_local()
    return parameter.detach()


def _copied(name: str, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG001 - one way to keep a weight
    return value.to("cpu", copy=True)


def full_weights(
    model: torch.nn.Module, keep: Callable[[str, torch.Tensor], torch.Tensor] = _copied
) -> dict[str, torch.Tensor] | None:
    """Return all whole weights and buffers by name, on the CPU of rank 0; None on the other ranks.

    keep: called on rank 0 with each name and value; returns what to keep of it, which is no part of the model.
    A collective where weights are sharded: every rank must call it. One parameter is gathered at a time, so no device
    needs room for the whole model. They are in fp32 whatever the precision of the training: an optimizer's step is
    often too small for 16 bits."""
    reshard(model)
    rank = dist.get_rank() if dist.is_initialized() else 0
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = _whole(parameter)
        if rank == 0:
            gathered[name] = keep(name, value.detach())
    if rank != 0:
        return None
    gathered.update({name: keep(name, buffer.detach()) for name, buffer in model.named_buffers()})
    return gathered


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        # Not by `GatheredParameters`: under autocast, DeepSpeed 0.19 gathers in 16 bits, and would round the weights.
        own = parameter.ds_tensor.detach().to(parameter.device)
        parts = own.new_empty(own.numel() * parameter.ds_zero_partition_world_size)
        dist.all_gather_into_tensor(parts, own, group=parameter.ds_process_group)
        return parts[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, dist.tensor.DTensor):
        return parameter.detach().full_tensor()
    return parameter.detach()
