"""A storage that remembers what was written, and checkpoints in it."""

from __future__ import annotations

import time
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, commit_step, upload_part
from tercet.artifacts.lease import Attempt
from tercet.storage.layout import attempt_folder
from tercet.storage.local import LocalStorage

RUN = "r1"

FILES = {
    "model.safetensors": b"weights",
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
    "optimizer-00000-of-00001.safetensors": b"moments",
    "ledger-00000-of-00001.npy": b"rows",
    "scheduler.pt": b"rate",
    "trainer_state.json": b"{}",
    "training_args.bin": b"arguments",
    "rng_state_0.pth": b"random",
}

MODEL_FILES = {"model.safetensors", "modules.json", "1_Pooling/config.json"}


def lineage(name: str, world_size: int = 1, generation: int = 1) -> tuple[Attempt, ...]:
    """The only attempt of a run that was never interrupted."""
    return (Attempt(name=name, generation=generation, first_step=0, world_size=world_size),)


class Recording(LocalStorage):
    """A folder that remembers the order of what was written and deleted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.written: list[str] = []

    def upload(self, path: Path, key: str, move: bool = False) -> None:
        super().upload(path, key, move)
        self.written.append(key)

    def _write(self, key: str, data: bytes, expected: str | None) -> str:
        token = super()._write(key, data, expected)
        self.written.append(key)
        return token


def trained(tmp_path: Path, weights: bytes = b"weights", files: dict[str, bytes] | None = None) -> Path:
    """What the trainer left on the disk of one rank."""
    folder = tmp_path / f"out-{time.monotonic_ns()}"
    for name, data in (files or {**FILES, "model.safetensors": weights}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def committed(
    storage: LocalStorage,
    tmp_path: Path,
    step: int,
    metric: float = 0.5,
    attempt: str = "a",
    weights: bytes = b"weights",
) -> Commit:
    upload_part(storage, trained(tmp_path, weights), attempt_folder(RUN, step, attempt), rank=0)
    return commit_step(storage, RUN, step, step / 10, {"ndcg@10": metric}, lineage(attempt), wait_seconds=1)
