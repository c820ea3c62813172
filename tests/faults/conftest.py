"""What whole runs share."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import tiny_model
from support.commands import check, run_command
from support.interrupted_run import settings
from support.workers import worker_command, write_plan


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout: random numbers must come back too."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    return tiny_model.tiny_bert(folder, tiny_model.all_texts(), dropout=0.1, pooler=False)


@pytest.fixture(scope="session")
def whole(
    model: Path, store: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, str]:
    """Runs that nothing happened to, by number of workers."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for num_workers in (1, 2):
        runs[num_workers] = f"whole-{num_workers}"
        plan = write_plan(folder, runs[num_workers], model, store, **settings(num_workers))
        check(run_command(worker_command(plan), environment, folder))
    return runs
