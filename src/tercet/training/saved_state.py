"""Keeps a copy of everything that a training step changes, and puts it back in every bit.

The copies of tensors are in host memory, so that they do not count among the device's. What a step changes: weights and
buffers, also of the loss; the optimizer's state, which may not exist yet; gradients; all random numbers; the scaler of
fp16; DeepSpeed's engine, its flat copies of the weights and its counters.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from tercet.model.sharding import local_values, reshard
from tercet.planning.parallelism import is_zero

# Names in DeepSpeed 0.19.8: the flat tensors of ZeRO-1 and 2, then of ZeRO-3.
_FLAT = (
    *("bit16_groups_flat", "single_partition_of_fp32_groups"),
    *("fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
)
_PLAIN = (bool, int, float, str, type(None))


class SavedState:
    """What a trainer's next step will change, as it is now."""

    def __init__(self, trainer: Any) -> None:
        """trainer: a TercetTrainer whose model and optimizer are wrapped."""
        self._trainer = trainer
        reshard(trainer.model)
        self._tensors = [(tensor, tensor.to("cpu", copy=True)) for tensor in _tensors(trainer)]
        self._modes = [(module, module.training) for module in _modules(trainer)]
        self._optimizer = _torch_optimizer(trainer)
        self._states = {
            parameter: {name: _Value(value) for name, value in state.items()}
            for parameter, state in self._optimizer.state.items()
        }
        self._groups = [
            {name: value for name, value in group.items() if name != "params"} for group in self._optimizer.param_groups
        ]
        self._plain = [
            (owner, {name: value for name, value in vars(owner).items() if isinstance(value, _PLAIN)})
            for owner in _owners(trainer)
        ]
        self._scheduler = trainer.lr_scheduler.state_dict()
        self._scaler = _Scaler(trainer.accelerator.scaler)
        self._random = _random_numbers(trainer.args.device)

    def put_back(self) -> None:
        """Put everything back as it was, and free the gradients."""
        trainer = self._trainer
        trainer.model_wrapped.zero_grad()
        for parameter in trainer.model.parameters():
            parameter.grad = None
        _release_gathered(trainer)
        with torch.no_grad():
            for tensor, copy in self._tensors:
                tensor.copy_(copy)
        for parameter in list(self._optimizer.state):
            if parameter not in self._states:
                del self._optimizer.state[parameter]
        for parameter, state in self._states.items():
            self._optimizer.state[parameter] = {name: value.put_back() for name, value in state.items()}
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(before)
        for owner, values in self._plain:
            for name, value in values.items():
                setattr(owner, name, value)
        for module, mode in self._modes:
            module.training = mode
        trainer.lr_scheduler.load_state_dict(self._scheduler)
        self._scaler.put_back()
        _set_random_numbers(trainer.args.device, self._random)


class _Value:
    """A value of the optimizer's state: a tensor keeps its identity."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._copy = local_values(value).to("cpu", copy=True) if isinstance(value, torch.Tensor) else None

    def put_back(self) -> Any:
        if self._copy is not None:
            local_values(self._value).copy_(self._copy)
        return self._value


class _Scaler:
    """State of a gradient scaler; it has no tensors before its first step."""

    _TENSORS = ("_scale", "_growth_tracker")

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._values = {} if scaler is None else {name: getattr(scaler, name) for name in self._TENSORS}
        self._values = {name: value if value is None else value.clone() for name, value in self._values.items()}

    def put_back(self) -> None:
        if self._scaler is None:
            return
        for name, value in self._values.items():
            setattr(self._scaler, name, value if value is None else value.clone())
        self._scaler._per_optimizer_states.clear()


def _release_gathered(trainer: Any) -> None:
    """Free the weights that are gathered: those of the step, which are to be put back, not to be used again."""
    reshard(trainer.model)
    if trainer._parallelism in ("zero3", "zero3_offload"):  # which keeps small ones gathered between steps
        trainer.model_wrapped.optimizer.parameter_offload.partition_all_parameters()


def _torch_optimizer(trainer: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer inside accelerate's and DeepSpeed's wrappers."""
    optimizer = trainer.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _owners(trainer: Any) -> Iterator[Any]:
    """Yield the objects whose counters and flags a step changes."""
    yield trainer.optimizer
    yield trainer.meter
    yield trainer.accelerator.gradient_state
    if is_zero(trainer._parallelism):
        yield trainer.model_wrapped
        yield trainer.model_wrapped.optimizer


def _modules(trainer: Any) -> Iterator[torch.nn.Module]:
    """Yield every module of the wrapped model and of the loss, once."""
    seen: set[int] = set()
    for root in (trainer.model_wrapped, trainer.loss):
        for module in root.modules() if isinstance(root, torch.nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _tensors(trainer: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold weights and buffers on this rank, each once."""
    engine = trainer.model_wrapped if is_zero(trainer._parallelism) else None
    seen: set[tuple[int, int, int]] = set()
    for tensor in (*_weights(trainer), *_flat(getattr(engine, "optimizer", None))):
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel())
        if tensor.numel() and key not in seen:
            seen.add(key)
            yield tensor


def _weights(trainer: Any) -> Iterator[torch.Tensor]:
    for module in _modules(trainer):
        for parameter in module.parameters(recurse=False):
            yield local_values(parameter)
        for buffer in module.buffers(recurse=False):
            yield local_values(buffer)


def _flat(optimizer: Any) -> Iterable[torch.Tensor]:
    for name in _FLAT:
        for tensor in getattr(optimizer, name, None) or ():
            if isinstance(tensor, torch.Tensor):
                yield tensor.detach()


def _random_numbers(device: torch.device) -> tuple[Any, ...]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device


def _set_random_numbers(device: torch.device, states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)
