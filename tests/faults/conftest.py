"""Fixtures that the fault tests share: a model, finished runs, and clusters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import tiny_model
from support.commands import check, run_command
from support.interrupted_run import settings
from support.machines import CannotIsolate
from support.ray_cluster import RayCluster, Run, ray_cluster
from support.workers import worker_of, write_plan


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that the state of random numbers must be restored too."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    return tiny_model.tiny_bert(folder, tiny_model.all_texts(), dropout=0.1, pooler=False)


@pytest.fixture(scope="session")
def whole(
    model: Path, store: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """Ids of undisturbed runs, by number of workers."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for num_workers in (1, 2):
        runs[num_workers] = f"whole-{num_workers}"
        plan = write_plan(folder, runs[num_workers], model, store, **settings(num_workers))
        check(run_command(worker_of(plan), environment, folder))
    return runs


@pytest.fixture(scope="module")
def new_cluster(environment: dict[str, str]) -> Iterator[Callable[..., RayCluster]]:
    """A function that starts clusters; all end with the module.

    Skips the test if there are no network namespaces, unless TERCET_REQUIRE_NETNS=1."""
    with ExitStack() as made:

        def make(dashboard: bool = False) -> RayCluster:
            try:
                return made.enter_context(ray_cluster(environment, dashboard))
            except CannotIsolate as error:
                if os.environ.get("TERCET_REQUIRE_NETNS") == "1":
                    raise
                pytest.skip(f"no network namespaces here: {error}")

        yield make


@pytest.fixture(scope="module")
def shared(new_cluster: Callable[..., RayCluster]) -> RayCluster:
    """A cluster that loses nodes and gets new ones."""
    return new_cluster()


@pytest.fixture
def cluster(shared: RayCluster) -> Iterator[RayCluster]:
    """The shared cluster. Drivers are killed at the end of each test."""
    yield shared
    shared.end_drivers()


@pytest.fixture
def new_run(model: Path, store: Path, tmp_path: Path) -> Callable[..., Run]:
    """A function that writes the recipe of a run."""

    def make(run_id: str, num_workers: int = 2, lease_seconds: float = 600) -> Run:
        sections = settings(num_workers, lease_seconds)
        sections["workers"] = {**sections["workers"], "max_failures": 2}
        recipe = tiny_model.write_recipe(tmp_path / f"{run_id}.yaml", model, store, **sections)
        return Run(run_id, recipe, store)

    return make
