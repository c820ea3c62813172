"""State that any number of ranks saved is loaded by any other number, bit for bit; damage is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.errors import CorruptObject, TrainingError
from tercet.storage.base import sha256_of
from tercet.training.optimizer_state import MOMENTS, Piece, _torch, file_name, load, save, tensors_of


class Model(torch.nn.Module):
    """Parameters of 0, 1 and 2 dimensions, one without elements, and one that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.table = torch.nn.Parameter(torch.randn(7, 5))
        self.bias = torch.nn.Parameter(torch.randn(5))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3))
        self.unused = torch.nn.Parameter(torch.randn(4))

    def loss(self) -> torch.Tensor:
        return ((self.scale * self.table + self.bias).square().sum() + self.empty.sum()).square()


def optimizer_of(model: Model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model: Model, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


def trained(num_steps: int = 3) -> tuple[Model, torch.optim.AdamW]:
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer, num_steps)
    return model, optimizer


def torch_pieces(
    model: Model, optimizer: torch.optim.Optimizer, rank: int = 0, world_size: int = 1, create: bool = False
) -> Iterator[Piece]:
    return _torch(optimizer, list(model.named_parameters()), rank, world_size, create)


def save_as_ranks(model: Model, optimizer: torch.optim.Optimizer, folder: Path, world_size: int) -> None:
    for rank in range(world_size):
        save(dict(tensors_of(torch_pieces(model, optimizer, rank, world_size))), folder, rank, world_size)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """State saved by two ranks of DDP after three steps."""
    save_as_ranks(*trained(), tmp_path / "saved", world_size=2)
    return tmp_path / "saved"


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_training_resumes_as_if_it_had_not_stopped(tmp_path: Path, world_size: int) -> None:
    model, optimizer = trained()
    save_as_ranks(model, optimizer, tmp_path, world_size)
    again = copy.deepcopy(model)
    optimizer_again = optimizer_of(again)
    load(torch_pieces(again, optimizer_again, create=True), tmp_path)
    train(model, optimizer, 3)
    train(again, optimizer_again, 3)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_that_hold_the_same_state_save_it_once(tmp_path: Path, world_size: int) -> None:
    save_as_ranks(*trained(), tmp_path, world_size)
    shares = [load_file(path) for path in sorted(tmp_path.iterdir())]
    sizes = [sum(tensor.numel() for name, tensor in share.items() if not name.endswith("step")) for share in shares]
    assert sum(sizes) == 2 * (1 + 35 + 5)  # two moments of each element, but for `unused`
    # Shares are equal but for what `unused`, which has nothing to save, takes of the last.
    assert max(sizes) - min(sizes) <= 2 * (4 + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file_name(r, world_size) for r in range(world_size)]


def test_a_parameter_that_never_had_a_gradient(tmp_path: Path) -> None:
    """It is saved as having no state: Adam begins at its first gradient."""
    model, optimizer = trained()
    assert model.unused not in optimizer.state
    save_as_ranks(model, optimizer, tmp_path, 2)
    again = copy.deepcopy(model)
    optimizer_again = optimizer_of(again)
    load(torch_pieces(again, optimizer_again, create=True), tmp_path)
    for one, its_optimizer in ((model, optimizer), (again, optimizer_again)):
        train(one, its_optimizer, 2)
        its_optimizer.zero_grad()
        one.unused.square().sum().backward()
        its_optimizer.step()
    assert torch.equal(model.unused, again.unused)
    assert not torch.equal(model.unused, trained()[0].unused)


def test_a_trained_parameter_missing_from_the_optimizer_is_refused() -> None:
    model = Model()
    optimizer = torch.optim.AdamW([model.table])
    with pytest.raises(TrainingError, match="scale is trained, but is not in the optimizer"):
        list(torch_pieces(model, optimizer))


def test_the_state_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    tensors = dict(tensors_of(torch_pieces(*trained())))
    assert save(tensors, tmp_path, 0, 1) == {file_name(0, 1): sha256_of(tmp_path / file_name(0, 1))}
    half = {name: tensor.half() for name, tensor in tensors.items()}
    assert save(half, tmp_path, 0, 1) == {}  # safetensors orders tensors of several types in its own way
    assert load_file(tmp_path / file_name(0, 1)).keys() == tensors.keys()


# --- pieces cut anywhere --------------------------------------------------------------------------------------------

SIZES = {"one": 1, "none": 0, "table": 37, "vector": 8}
STEP = 5.0


def whole(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {moment: torch.randn(num_elements, generator=generator) for moment in MOMENTS}
        for name, num_elements in SIZES.items()
    }


def cut(values: dict[str, dict[str, torch.Tensor]], world_size: int, draw: random.Random) -> list[list[Piece]]:
    """Cut each parameter into `world_size` ranges, some of them empty; a rank may hold no element of a parameter.

    The pieces of a rank share one state, as in ZeRO, and are views into the given values."""
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    states: list[dict[str, Any]] = [{"step": torch.tensor(STEP)} for _ in range(world_size)]
    for name, moments in values.items():
        num_elements = SIZES[name]
        ends = sorted(draw.randint(0, num_elements) for _ in range(world_size - 1))
        order = draw.sample(range(world_size), world_size)
        for rank, start, end in zip(order, [0, *ends], [*ends, num_elements], strict=True):
            if start == end and num_elements and draw.random() < 0.5:
                continue  # ZeRO leaves it out, FSDP2 keeps an empty one
            views = {moment: tensor[start:end] for moment, tensor in moments.items()}
            ranks[rank].append(Piece(name, start, views, states[rank]))
    return ranks


def write(ranks: list[list[Piece]], folder: Path) -> Path:
    for rank, pieces in enumerate(ranks):
        save(dict(tensors_of(iter(pieces))), folder, rank, len(ranks))
    return folder


@pytest.mark.parametrize("seed", range(25))
def test_state_cut_in_any_way_is_read_in_any_other(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    write(cut(whole(), draw.randint(1, 6), draw), tmp_path)
    read = {name: {moment: torch.full((n,), -1.0) for moment in MOMENTS} for name, n in SIZES.items()}
    for pieces in cut(read, draw.randint(1, 6), draw):
        for piece in pieces:
            piece.state.clear()
        load(iter(pieces), tmp_path)
        assert all(piece.state["step"].item() == STEP for piece in pieces)
    for name, moments in whole().items():
        for moment, tensor in moments.items():
            assert torch.equal(read[name][moment], tensor), (name, moment)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_ddp_run_resumes_sharded_and_a_sharded_one_with_ddp(tmp_path: Path, world_size: int) -> None:
    """Pieces of a trained model's state, saved as by ranks that shard, are loaded into a torch optimizer."""
    model, optimizer = trained()
    draw = random.Random(world_size)
    ranks: list[list[Piece]] = [[] for _ in range(world_size)]
    for piece in torch_pieces(model, optimizer):
        if not piece.moments:
            ranks[0].append(piece)
            continue
        num_elements = piece.moments[MOMENTS[0]].numel()
        ends = sorted(draw.randint(0, num_elements) for _ in range(world_size - 1))
        for rank, start, end in zip(range(world_size), [0, *ends], [*ends, num_elements], strict=True):
            views = {moment: view[start:end] for moment, view in piece.moments.items()}
            ranks[rank].append(Piece(piece.name, start, views, piece.state))
    write(ranks, tmp_path)
    again = Model()
    optimizer_again = optimizer_of(again)
    load(torch_pieces(again, optimizer_again, create=True), tmp_path)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(optimizer_again.state[again.get_parameter(name)][key], value), (name, key)


# --- what must not be read ------------------------------------------------------------------------------------------


def read_whole(folder: Path) -> None:
    empty = {name: {moment: torch.zeros(n) for moment in MOMENTS} for name, n in SIZES.items()}
    [pieces] = cut(empty, 1, random.Random(0))
    for piece in pieces:
        piece.state.clear()
    load(iter(pieces), folder)


def two_files(folder: Path) -> tuple[Path, Path]:
    """Write two files: `table` cut at element 20, everything else in the first file."""
    values, state = whole(), {"step": torch.tensor(STEP)}
    ranks: list[list[Piece]] = [[], []]
    for name, moments in values.items():
        ranks[0].append(Piece(name, 0, {m: t[:20] if name == "table" else t for m, t in moments.items()}, state))
    ranks[1].append(Piece("table", 20, {m: t[20:] for m, t in values["table"].items()}, state))
    write(ranks, folder)
    return folder / file_name(0, 2), folder / file_name(1, 2)


def test_the_files_of_these_tests_can_be_read(tmp_path: Path) -> None:
    two_files(tmp_path)
    read_whole(tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_file(tmp_path: Path, rank: int) -> None:
    path = two_files(tmp_path)[rank]
    path.unlink()
    with pytest.raises(CorruptObject, match=path.name) as caught:
        read_whole(tmp_path)
    assert caught.value.hint


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(CorruptObject, match=file_name(0, 1)):
        read_whole(tmp_path)


def test_a_file_of_another_checkpoint_beside_them(tmp_path: Path) -> None:
    write(cut(whole(), 3, random.Random(0)), tmp_path)
    two_files(tmp_path)
    with pytest.raises(CorruptObject, match="not 2 files of one checkpoint"):
        read_whole(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = two_files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptObject, match=f"{path.name} cannot be read") as caught:
        read_whole(tmp_path)
    assert caught.value.hint


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace or add tensors of a file; None removes one."""
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


EXTRA = torch.zeros(5)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"table|exp_avg|20": None}, "table exp_avg: element 20 is missing"),
        ({"table|exp_avg|20": None, "table|exp_avg|21": torch.zeros(16)}, "table exp_avg: element 20 is missing"),
        ({"table|exp_avg|20": torch.zeros(16)}, "table exp_avg: element 36 is missing"),
        ({"table|exp_avg_sq|0": EXTRA}, "table exp_avg_sq: element 0 is stored twice"),
        ({"table|exp_avg_sq|3": EXTRA}, "table exp_avg_sq: element 3 is stored twice"),
        ({"table|exp_avg_sq|18": EXTRA}, "table exp_avg_sq: element 18 is stored twice"),
        ({"table|exp_avg_sq|32": EXTRA}, "table exp_avg_sq: element 32 is stored twice"),
        ({"vector|exp_avg|0": torch.zeros(8)}, "vector exp_avg: element 0 is stored twice"),
        ({"table|step": torch.tensor(4.0)}, "table is at optimizer step 5 in one file and 4 in another"),
    ],
)
def test_each_element_is_stored_once(tmp_path: Path, changes: dict[str, torch.Tensor | None], fault: str) -> None:
    change(two_files(tmp_path)[1], changes)
    with pytest.raises(CorruptObject, match=fault) as caught:
        read_whole(tmp_path)
    assert caught.value.hint


def test_state_of_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(CorruptObject, match="holds no optimizer state of one") as caught:
        read_whole(saved)
    assert "another recipe" in caught.value.hint


@pytest.mark.parametrize("shared", [True, False])
def test_parameters_at_different_steps(tmp_path: Path, shared: bool) -> None:
    """torch keeps one step per parameter, DeepSpeed one for all."""
    states = [{"step": torch.tensor(STEP)}, {"step": torch.tensor(STEP - 1)}]
    tensors = {moment: torch.ones(2) for moment in MOMENTS}
    pieces = [Piece(name, 0, tensors, state) for name, state in zip("ab", states, strict=True)]
    save(dict(tensors_of(iter(pieces))), tmp_path, 0, 1)
    read: list[dict[str, Any]] = [{}, {}]
    if shared:
        read[1] = read[0]
    pieces = [Piece(name, 0, tensors, state) for name, state in zip("ab", read, strict=True)]
    if shared:
        with pytest.raises(CorruptObject, match="b is at optimizer step 4, others at 5"):
            load(iter(pieces), tmp_path)
    else:
        load(iter(pieces), tmp_path)
        assert [state["step"].item() for state in read] == [STEP, STEP - 1]


def test_a_parameter_without_gradient_in_a_shared_state(tmp_path: Path) -> None:
    """It does not reset the step that DeepSpeed keeps for all parameters."""
    ones = {moment: torch.ones(2) for moment in MOMENTS}
    written = [Piece("b", 0, ones, {"step": torch.tensor(STEP)}), *(Piece(name, 0, {}, {}) for name in "ac")]
    save(dict(tensors_of(iter(written))), tmp_path, 0, 1)
    state: dict[str, Any] = {}
    moments = {name: {moment: torch.full((2,), 9.0) for moment in MOMENTS} for name in "abc"}
    load(iter([Piece(name, 0, views, state) for name, views in moments.items()]), tmp_path)
    assert state["step"].item() == STEP
    assert [moments[name]["exp_avg"].tolist() for name in "abc"] == [[0, 0], [1, 1], [0, 0]]
