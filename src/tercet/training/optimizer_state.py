"""Saves and loads the optimizer's state in one format for every parallelism and any number of workers.

Each rank writes what it holds: pieces of flattened parameters, in one safetensors file. Nothing is gathered.

    optimizer-00000-of-00002.safetensors    tensors named `<parameter>|<moment>|<start>`, `start` in elements
                                            and `<parameter>|step`, a scalar; 0 and no moments for a parameter
                                            that never had a gradient

A rank that resumes reads the ranges that it now holds from the files that contain them. So a run may resume with
another number of workers or another parallelism. Every element must be stored exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tercet.artifacts.tensor_file import write_tensors
from tercet.config.sections import Parallelism
from tercet.errors import CorruptObject, TrainingError
from tercet.model.sharding import reshard
from tercet.planning.parallelism import is_zero

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """The part of one parameter's optimizer state that this rank holds."""

    name: str
    start: int
    """Index of the first element in the flattened parameter."""
    moments: dict[str, torch.Tensor]
    """Views by name, shape (num_elements,): writing to them changes the state. Empty if there never was a gradient."""
    state: dict[str, Any]
    """The optimizer's own dictionary, which holds the step."""


def file_name(rank: int, world_size: int) -> str:
    """Return the name of one rank's file."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def tensors_of(pieces: Iterator[Piece]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of pieces by their names in the file. They are the optimizer's own, on its device."""
    for piece in pieces:
        step = torch.as_tensor(piece.state.get("step", 0), dtype=torch.float32)
        yield f"{piece.name}|step", step.reshape(())
        for moment, view in piece.moments.items():
            yield f"{piece.name}|{moment}|{piece.start}", view.detach()


def save(tensors: Mapping[str, torch.Tensor], folder: Path, rank: int, world_size: int) -> dict[str, str]:
    """Write a rank's tensors, copied to host memory, to its file in a folder.

    Returns the file's sha256 by its name, where it is known without reading the file."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(rank, world_size)
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        save_file(dict(tensors), folder / name)
        return {}
    return {name: write_tensors(tensors, folder / name)}


def load(pieces: Iterator[Piece], folder: Path) -> None:
    """Fill this rank's pieces from all files in a folder.

    A parameter that never had a gradient gets zeros and step 0, which is how Adam begins. Raises CorruptObject when a
    file is missing or damaged, or an element is missing or stored twice."""
    sources: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
    steps: dict[str, float] = {}
    for file in _open_all(folder):
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, moment, *start = key.split("|")
            if moment == "step":
                step = float(file.get_tensor(key))
                if steps.setdefault(name, step) != step:
                    raise CorruptObject(
                        f"{folder}: {name} is at optimizer step {steps[name]:g} in one file and {step:g} in another",
                        hint="the files belong to several checkpoints: use another checkpoint",
                    )
            else:
                sources.setdefault((name, moment), []).append((int(start[0]), file, key))
    for piece in pieces:
        if piece.name not in steps:
            raise CorruptObject(
                f"{folder} holds no optimizer state of {piece.name}",
                hint="the checkpoint belongs to another model: did it come from another recipe?",
            )
        if steps[piece.name] == 0 and not any((piece.name, moment) in sources for moment in piece.moments):
            piece.state.setdefault("step", torch.tensor(0.0, device=_step_device(piece)))
            for view in piece.moments.values():
                view.zero_()
            continue
        _set_step(piece, steps[piece.name], folder)
        for moment, view in piece.moments.items():
            _fill(view, piece.start, sources.get((piece.name, moment), []), f"{folder}: {piece.name} {moment}")


def _open_all(folder: Path) -> list[Any]:
    paths = sorted(folder.glob("optimizer-*-of-*.safetensors"))
    num_files = int(paths[0].stem.rpartition("-")[2]) if paths else 1
    wanted = {file_name(rank, num_files) for rank in range(num_files)}
    if differing := sorted(wanted ^ {path.name for path in paths}):
        raise CorruptObject(
            f"{folder}: the optimizer's state is not {num_files} files of one checkpoint: see {', '.join(differing)}",
            hint="use another checkpoint",
        )
    files = []
    for path in paths:
        try:
            files.append(safe_open(path, "pt"))
        except (OSError, SafetensorError) as error:
            raise CorruptObject(f"{path} cannot be read: {error}", hint="use another checkpoint") from error
    return files


def _set_step(piece: Piece, step: float, folder: Path) -> None:
    current = piece.state.get("step")
    if current is not None and float(current) not in (0.0, step):
        raise CorruptObject(
            f"{folder}: {piece.name} is at optimizer step {step:g}, others at {float(current):g}",
            hint="DeepSpeed keeps one step for all parameters: resume with workers.parallelism=ddp or fsdp2",
        )
    piece.state["step"] = torch.tensor(step, dtype=torch.float32, device=_step_device(piece))


def _step_device(piece: Piece) -> torch.device:
    # A fused optimizer keeps its step beside the moments.
    return next(iter(piece.moments.values())).device


def _fill(view: torch.Tensor, start: int, sources: list[tuple[int, Any, str]], what: str) -> None:
    position, end = start, start + view.numel()
    for source_start, file, key in sorted(sources, key=lambda source: source[0]):
        stored = file.get_slice(key)
        first, last = max(source_start, start), min(source_start + stored.get_shape()[0], end)
        if first >= last:
            continue
        if first != position:
            break
        view[first - start : last - start].copy_(stored[first - source_start : last - source_start])
        position = last
    else:
        if position == end:
            return
        first = end
    fault = "missing" if first > position else "stored twice"
    raise CorruptObject(f"{what}: element {min(first, position)} is {fault}", hint="use another checkpoint")


def pieces(trainer: Any, parallelism: Parallelism, create: bool = False) -> Iterator[Piece]:
    """Yield the pieces of optimizer state that this rank holds. Not a collective.

    create: first allocate state where there is none, to be filled by `load`. With DDP, every rank then holds all of it;
    otherwise each yields an equal share, for `save`.

    The functions below read internals of transformers 5.23, accelerate 1.15 and DeepSpeed 0.19.8."""
    optimizer = trainer.optimizer.optimizer
    reshard(trainer.model)
    named = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    if is_zero(parallelism):
        of_zero = _zero3 if trainer.model_wrapped.zero_optimization_stage() == 3 else _zero12
        yield from of_zero(optimizer, named, create)
    else:
        yield from _torch(optimizer, named, trainer.args.process_index, trainer.args.world_size, create)


def _torch(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, Any]], rank: int, world_size: int, create: bool
) -> Iterator[Piece]:
    """Yield the pieces of FSDP2 or DDP.

    FSDP2: slices of the first dimension. DDP: each rank holds everything; to save, it takes an equal share of all
    elements; to load (`create`), it fills everything."""
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    num_elements = sum(parameter.numel() for _, parameter in named)
    first, last = num_elements * rank // world_size, num_elements * (rank + 1) // world_size
    offset = 0
    for name, parameter in named:
        if id(parameter) not in optimized:
            raise TrainingError(
                f"{name} is trained, but is not in the optimizer: its state cannot be saved",
                hint="this is a fault of tercet or of the installed libraries",
            )
        state = optimizer.state[parameter]
        if create:
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
        offset += parameter.numel()
        if not state:  # never had a gradient
            yield Piece(name, 0, {}, {})
        elif isinstance(parameter, torch.distributed.tensor.DTensor):
            rows_per_rank = -(-parameter.shape[0] // world_size)  # as torch.chunk cuts
            start = min(rank * rows_per_rank, parameter.shape[0]) * parameter[0:1].numel()
            yield Piece(name, start, {moment: _flat(state[moment].to_local()) for moment in MOMENTS}, state)
        else:
            begin = offset - parameter.numel()
            start, end = (0, parameter.numel()) if create else (max(first - begin, 0), min(last, offset) - begin)
            if start < end or (parameter.numel() == 0 and rank == 0):
                moments = {moment: _flat(state[moment])[start:end] for moment in MOMENTS}
                yield Piece(name, start, moments, state)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)


def _zero12(optimizer: Any, named: list[tuple[str, Any]], create: bool) -> Iterator[Piece]:
    """Yield the pieces of ZeRO-1 or 2.

    DeepSpeed puts the parameters of a group end to end, and cuts the result into one partition per rank. `_hp_mapping`
    says which elements of a parameter are where in this rank's partition; it is None if none are."""
    states = [optimizer.optimizer.state[flat] for flat in optimizer.single_partition_of_fp32_groups]
    if create:
        for flat, state in zip(optimizer.single_partition_of_fp32_groups, states, strict=True):
            state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
    for name, parameter in named:
        if (mapping := parameter._hp_mapping) is None:
            continue
        state = states[mapping.param_group_index]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        moments = {moment: state[moment].narrow(0, here.start, here.numel) for moment in MOMENTS}
        yield Piece(name, there.start, moments, state)


def _zero3(optimizer: Any, named: list[tuple[str, Any]], create: bool) -> Iterator[Piece]:
    """Yield the pieces of ZeRO-3.

    Each parameter is cut into equal parts, the last one padded. `grad_position` says in which flat group, and where in
    it, this rank's part is."""
    groups = optimizer.fp32_partitioned_groups_flat
    if create:
        for flat in groups:
            optimizer.optimizer.state[flat].update({moment: torch.zeros_like(flat) for moment in MOMENTS})
    for name, parameter in named:
        index, offset, num_elements = optimizer.grad_position[optimizer.get_param_id(parameter)]
        state = optimizer.optimizer.state[groups[index]]
        start = optimizer._get_param_partition_rank(parameter) * num_elements
        num_real = max(min(num_elements, parameter.ds_numel - start), 0)
        if num_real:
            moments = {moment: state[moment].narrow(0, offset, num_real) for moment in MOMENTS}
            yield Piece(name, start, moments, state)
