"""Methods of the trainer that can be tested without training."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from tercet.training.trainer import TercetTrainer


@pytest.mark.parametrize(("before", "now"), [(2, 4), (1, 2), (4, 2)])
def test_on_another_number_of_ranks_each_seeds_itself(tmp_path: Path, before: int, now: int) -> None:
    """Python's random state is equal on all ranks: MatryoshkaLoss draws its dimensions from it."""
    names = ["rng_state.pth"] if before == 1 else [f"rng_state_{rank}.pth" for rank in range(before)]
    for name in names:
        (tmp_path / name).write_bytes(b"not looked at")
    drawn = []
    for rank in range(now):
        args = SimpleNamespace(world_size=now, process_index=rank, seed=7)
        trainer: Any = SimpleNamespace(args=args, state=SimpleNamespace(global_step=10))
        TercetTrainer._load_rng_state(trainer, str(tmp_path))
        drawn.append((random.random(), float(torch.rand(()))))
    assert len({of_python for of_python, _ in drawn}) == 1
    assert len({of_torch for _, of_torch in drawn}) == now


def test_on_the_same_number_of_ranks_each_restores_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").write_bytes(b"not looked at")
    loaded: list[Any] = []
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda _, checkpoint: loaded.append(checkpoint))
    trainer = TercetTrainer.__new__(TercetTrainer)
    trainer.args = SimpleNamespace(world_size=2, process_index=1, seed=7)
    trainer._load_rng_state(str(tmp_path))
    trainer._load_rng_state(None)
    assert loaded == [str(tmp_path), None]
