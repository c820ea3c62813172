"""Start workers without Ray, as torchrun does, and read what they left in storage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support import tiny_model
from support.commands import PROGRAMS
from support.forks import Forked, Process, start
from tercet.artifacts.checkpoint import Commit, read_commits
from tercet.config.recipe import load_config
from tercet.failpoints import VARIABLE
from tercet.planning.plan import TrainPlan
from tercet.planning.survey import survey
from tercet.storage import open_storage


def make_plan(recipe: Path, run_id: str, overrides: tuple[str, ...] = ()) -> TrainPlan:
    """Derive the plan as `tercet plan` does."""
    return survey(load_config(recipe, overrides), run_id)[1]


def write_plan(folder: Path, run_id: str, model: Path, store: Path, /, **sections: Any) -> Path:
    """Write the plan of a recipe of tiny_model to a file."""
    recipe = tiny_model.write_recipe(folder / f"{run_id}.yaml", model, store, **sections)
    path = folder / f"{run_id}.json"
    path.write_text(make_plan(recipe, run_id).model_dump_json(), encoding="utf-8")
    return path


def worker_of(*plans: Path) -> Forked:
    """One worker, or as many as the plan says under torchrun. Several plans: one after the other."""
    num_workers = json.loads(plans[0].read_text())["config"]["workers"]["num_workers"]
    program = ("-m", "tercet.cli", "worker") if len(plans) == 1 else (str(PROGRAMS / "several_plans.py"),)
    return Forked((*program, *map(str, plans)), 0 if num_workers == 1 else num_workers)


def held_worker(plan: Path, environment: Mapping[str, str], step: int, until: Path) -> AbstractContextManager[Process]:
    """A worker that waits before `step` until the file `until` exists. A .held file beside its plan is the sign."""
    armed = f"at=before_step step={step} do=hang once={plan.with_suffix('.held')} until={until}"
    return armed_worker(plan, environment, armed)


@contextmanager
def armed_worker(plan: Path, environment: Mapping[str, str], armed: str) -> Iterator[Process]:
    """A worker that runs beside the test and is killed at its end. Its output is in a .log file beside its plan."""
    with plan.with_suffix(".log").open("w") as log:
        process = start(worker_of(plan), {**environment, VARIABLE: armed}, plan.parent, log)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=60)


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 240) -> None:
    """Wait for a condition. Fails if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def commits(store: Path, run_id: str) -> list[Commit]:
    """Commits of a run, newest first."""
    return read_commits(open_storage(str(store)), run_id)


def model_folder(store: Path, commit: Commit) -> Path:
    """Folder of a commit's files, in a storage that is a local folder."""
    return store / commit.folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of every module of a SentenceTransformer folder, by name."""
    return {
        f"{path.parent.relative_to(folder)}/{name}": value
        for path in sorted(folder.rglob("model.safetensors"))
        for name, value in load_file(path).items()
    }


def final_weights(store: Path, run_id: str) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    return weights(model_folder(store, commits(store, run_id)[0]))


def largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Largest difference over all weights; 0.0 means equal in every bit. The names must be the same."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def training_log(store: Path, run_id: str) -> dict[str, Any]:
    """The training.json of a run."""
    log: dict[str, Any] = json.loads((store / "runs" / run_id / "training.json").read_text())
    return log
