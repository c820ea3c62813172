"""Proves, before a run trains, that its model can be saved and loaded again, and in which form it is written.

A checkpoint is right if the model that is loaded from it has the weights that were in memory. Names and shapes do not
show that: transformers 5.23 writes some architectures in another form than it holds them (gte, nomic_bert and
jina_embeddings_v3: query, key and value in one tensor), and a model's own code may write anything. So a copy of the
model is saved and loaded once, and compared weight for weight. Its weights are drawn at random for this, because a
fresh model has many equal ones: a bias of zeros that is not saved, or that is saved in the place of another, would come
back as zeros.

The trial also records the names, shapes and types of the tensors that it wrote. Each checkpoint must have the same.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, CorruptObject, first_line
from tercet.model.encoder import load_model, make_model, save, stored_model
from tercet.model.lora import TRAINED_WEIGHTS
from tercet.model.sharding import unsharded
from tercet.storage.documents import Document, Frozen

# Room that the trial needs, in copies of the model: the copy itself, what is written at a time, and the files, whose
# folder may be in memory.
COPIES_IN_MEMORY = 3
SMALL_NUM_LAYERS = 2
NUM_SHOWN = 3


class TensorForm(Frozen):
    """What the header of a safetensors file says about a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as F32."""


Form = dict[str, TensorForm]
"""The tensors of a saved model: `<folder>/<name>`, without the folder for those of the encoder."""


class SavedForm(Document):
    """How a run's models are written, as a trial before the first step found."""

    forms: tuple[Form, ...]
    """The form of a model that was loaded from the base model; where it differs, also that of one loaded from a
    checkpoint."""
    num_layers: int | None
    """Layers of the copy that was tried; None if it was whole."""
    num_weights: int
    """Weights that were compared. A weight that several modules share counts once."""


def read_form(folder: Path) -> Form:
    """Return the tensors of the model in a folder. Reads only the headers of the files."""
    form: Form = {}
    for path in sorted(folder.rglob("model*.safetensors")):
        place = path.parent.relative_to(folder)
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry = file.get_slice(name)
                form[(place / name).as_posix()] = TensorForm(shape=tuple(entry.get_shape()), dtype=entry.get_dtype())
    return form


def check_saved(folder: Path, saved_form: SavedForm) -> None:
    """Check that the tensors of a saved model have the names, shapes and types that the trial recorded.

    Reads only the headers of the files; their contents are hashed when they are uploaded. Where the trial had fewer
    layers than the model, layers are compared with those of the trial. Raises CorruptObject if any tensor differs."""
    form = read_form(folder)
    problems = min((_differences(form, wanted, saved_form.num_layers) for wanted in saved_form.forms), key=len)
    if problems:
        raise CorruptObject(
            f"{folder}: the saved model is not complete: {_listed(problems)}",
            hint="this is a fault of tercet or of the installed libraries; the checkpoint is not committed",
        )


def _differences(form: Form, wanted: Form, num_layers: int | None) -> list[str]:
    if num_layers is not None:
        form, wanted = _by_layer(form), _by_layer(wanted)
    problems = [f"{name} is missing" for name in wanted if name not in form]
    problems += [f"{name} is unexpected" for name in form if name not in wanted]
    for name, tensor in form.items():
        if name in wanted and tensor != wanted[name]:
            has, should = (f"{each.dtype} of shape {each.shape}" for each in (tensor, wanted[name]))
            problems.append(f"{name} is {has}, and should be {should}")
    return problems


def _by_layer(form: Form) -> Form:
    """Return tensors with `*` in place of the numbers in their names."""
    return {".".join("*" if part.isdigit() else part for part in name.split(".")): each for name, each in form.items()}


def _listed(problems: list[str]) -> str:
    more = len(problems) - NUM_SHOWN
    return "; ".join(problems[:NUM_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


# --- the trial ------------------------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """A parameter or buffer in memory."""

    shape: tuple[int, ...]
    dtype: str
    same_as: str
    """The first name of this tensor: of another module, where several share it."""
    sha256: str


def prove_saving(config: ModelConfig, model: SentenceTransformer) -> SavedForm:
    """Save a copy of a model with random weights, load it again, and compare every weight and buffer.

    config: what the model was made from. model: the one to be trained, on any device, perhaps sharded; it does not
    change, nor does the random state of this process. Where this machine has no room for a second copy, the copy has
    SMALL_NUM_LAYERS layers. Not a collective. Raises ConfigError if a weight differs, or if the copy cannot be saved or
    loaded."""
    with tempfile.TemporaryDirectory(prefix="tercet-trial-") as name, unsharded(), torch.random.fork_rng(devices=[]):
        num_layers = None if _has_room(model, name) else SMALL_NUM_LAYERS
        trial = make_model(config, "cpu") if num_layers is None else small_copy(model, num_layers)
        draw_weights(trial)
        # transformers knows a model's own code by the name of its folder: each model has one of its own.
        folder = Path(name) / hashlib.sha256(f"{config.name_or_path}@{config.revision}".encode()).hexdigest()[:16]
        with _explained(config, "cannot be saved"):
            wanted, problems = _save(config, trial, folder)
        _clear(trial)
        del trial
        with _explained(config, "cannot be loaded after it was saved"):
            again = load_model(stored_model(config, folder), "cpu")
        problems += _compare(wanted, _weights_of(again))
        if problems:
            raise ConfigError(
                f"model.name_or_path={config.name_or_path}: the model changes when it is saved and loaded again: "
                f"{_listed(problems)}",
                hint="the model's own code or the installed transformers saves it wrongly; use another model, or "
                "another version of either",
            )
        form = read_form(folder)
        shutil.rmtree(folder)
        # A run that resumes saves what it loaded from a checkpoint.
        with _explained(config, "cannot be saved after it was loaded again"):
            again.save_pretrained(str(folder), create_model_card=False)
        again_form = read_form(folder)
    return SavedForm(
        forms=(form,) if again_form == form else (form, again_form),
        num_layers=num_layers,
        num_weights=sum(weight.same_as == name for name, weight in wanted.items()),
    )


def draw_weights(model: torch.nn.Module) -> None:
    """Fill all parameters, and those buffers of real numbers that are saved, with random values in [-1, 1)."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1, generator=draw)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                buffer.uniform_(-1, 1, generator=draw)


def _clear(model: torch.nn.Module) -> None:
    """Fill a model with zeros. A weight that is missing when a model is loaded may be made of memory that was not
    cleared, such as that of the model before."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().zero_()


def small_copy(model: SentenceTransformer, num_layers: int) -> SentenceTransformer:
    """Return a copy of a model on the CPU that has only the first layers of its encoder, and undefined weights.

    model: on any device, perhaps sharded. Nothing but the model's buffers is copied: memory is taken when the weights
    are filled."""
    encoder = model.transformers_model
    num_layers_before = encoder.config.num_hidden_layers
    # deepcopy takes these for copies that it has made already: by the id of the original.
    made: dict[int, Any] = {id(buffer): buffer.detach().cpu().clone() for buffer in model.buffers()}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # with ZeRO-3, the parameter itself is empty
        made[id(parameter)] = torch.nn.Parameter(torch.empty(shape), parameter.requires_grad)
    made[id(encoder.config)] = config = copy.deepcopy(encoder.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == num_layers_before:  # such as the type of each layer
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    for module in encoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers_before:
            made[id(module)] = copy.deepcopy(module[:num_layers], made)
    return SentenceTransformer(modules=[copy.deepcopy(module, made) for module in model], device="cpu")


def _has_room(model: SentenceTransformer, folder: str) -> bool:
    """Return whether this machine has memory and disk for a second copy of a model, in fp32."""
    num_bytes: int = 4 * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return COPIES_IN_MEMORY * num_bytes <= _available_bytes() and num_bytes <= shutil.disk_usage(folder).free


def _available_bytes() -> int:
    """Return the memory that this machine can still give away, without swapping where that is known (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.removesuffix("kB")) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def _explained(config: ModelConfig, what: str) -> Iterator[None]:
    """Raise ConfigError for an error in the block, unless the machine is at fault: no memory, a full disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (
            isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        ):
            raise
        raise ConfigError(
            f"model.name_or_path={config.name_or_path}: the model {what}: {type(error).__name__}: {first_line(error)}",
            hint="no checkpoint of it could be made: use another model, or another version of transformers",
        ) from error


def _save(config: ModelConfig, trial: SentenceTransformer, folder: Path) -> tuple[dict[str, _Weight], list[str]]:
    """Save a trial model as a checkpoint's. Returns the weights that were to be saved, and what is wrong with the
    adapter's."""
    if config.lora is None:
        wanted = _weights_of(trial)
        save(config, trial, folder)
        return wanted, []
    trained = {name: parameter for name, parameter in trial.named_parameters() if parameter.requires_grad}
    adapter = _weights(trained.items())
    save(config, trial, folder)
    problems = _compare(adapter, _weights(load_file(folder / TRAINED_WEIGHTS).items()))
    return _weights_of(trial), problems  # now with the adapter merged


def _weights_of(model: torch.nn.Module) -> dict[str, _Weight]:
    return _weights([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _weights(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, _Weight]:
    weights: dict[str, _Weight] = {}
    first_names: dict[int, str] = {}
    for name, tensor in named:
        first = first_names.setdefault(id(tensor), name)
        sha256 = weights[first].sha256 if first in weights else _sha256(tensor)
        weights[name] = _Weight(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), first, sha256)
    return weights


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _compare(wanted: dict[str, _Weight], again: dict[str, _Weight]) -> list[str]:
    """Return what differs between the weights that were saved and those that were loaded."""
    problems = [f"{name} is missing" for name in wanted if name not in again]
    problems += [f"{name} is new" for name in again if name not in wanted]
    for name, weight in wanted.items():
        if (other := again.get(name)) is None or other == weight:
            continue
        if other[:2] != weight[:2]:
            shapes = (f"{each.dtype} of shape {each.shape}" for each in (other, weight))
            problems.append(f"{name} is {' instead of '.join(shapes)}")
        elif other.same_as != weight.same_as:
            problems.append(f"{name} is shared with another module before or after, not both")
        else:
            problems.append(f"{name} has other values")
    return problems
