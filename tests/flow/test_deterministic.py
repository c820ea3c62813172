"""`training.deterministic` sets torch up in the worker, and changes no bit of a run on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.commands import PROGRAMS, check, run_command
from support.forks import Forked
from support.workers import final_weights, largest_difference, write_plan

OFF = {"algorithms": False, "only warns": False, "cudnn": False, "benchmark": False, "workspace": None}
ON = {**OFF, "algorithms": True, "cudnn": True, "workspace": ":4096:8"}


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_torch_is_set_up_in_the_worker(
    given: str | None, tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    run_ids = {f"deterministic-{wanted}-{given is None}": wanted for wanted in (True, False)}
    workspace = {} if given is None else {"CUBLAS_WORKSPACE_CONFIG": given}
    for run_id, wanted in run_ids.items():
        training = {"num_epochs": 1, "max_train_rows": 64, "deterministic": wanted}
        plan = write_plan(tmp_path, run_id, tiny_model_dir, store, training=training)
        program = Forked((str(PROGRAMS / "determinism.py"), str(plan)))
        output = check(run_command(program, {**environment, **workspace}, tmp_path)).stdout
        expected = ON if wanted else OFF
        assert json.loads(output.splitlines()[-1]) == {**expected, "workspace": given or expected["workspace"]}
    assert largest_difference(*(final_weights(store, run_id) for run_id in run_ids)) == 0.0
