"""Under Ray, dead workers are started again, and the next start completes what a dead driver left unfinished."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support import tiny_model
from support.commands import check, run_command, tercet
from support.interrupted_run import final_state, proof, settings
from support.tiers import in_soak
from support.workers import training_log, wait_until, worker_of, write_plan
from tercet.artifacts.best import read_best
from tercet.artifacts.checkpoint import read_commits
from tercet.failpoints import VARIABLE
from tercet.storage import open_storage


def report(store: Path, run_id: str) -> Any:
    return json.loads((store / "runs" / run_id / "report.json").read_text())


def test_ray_restarts_dead_workers_without_changing_the_result(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """The new workers do not wait for the lease of the dead ones, because they belong to the same launch."""
    sections = settings(num_workers=2, lease_seconds=600)
    sections["workers"] = {**sections["workers"], "max_failures": 1}
    recipe = tiny_model.write_recipe(tmp_path / "recipe.yaml", model, store, **sections)
    armed = {VARIABLE: f"at=before_commit rank=0 step=12 once={tmp_path / 'fired'}"}
    command = tercet("train", recipe, "--run-id", "ray")
    done = check(run_command(command, {**environment, **armed}, tmp_path))
    assert (tmp_path / "fired").exists()
    assert "in 2 attempts" in done.stdout
    assert report(store, "ray")["num_attempts"] == 2
    assert training_log(store, "ray")["resumed_from_step"] == 11
    assert final_state(store, "ray") == final_state(store, whole[2])
    assert len(proof(store, recipe, "ray").attempts) == 2


AT = "a test asked for this error at "


@pytest.mark.parametrize(
    ("place", "others"),
    [
        ("at=after_backward step=6", ""),
        *in_soak(
            [
                ("at=in_evaluation step=11", ""),
                ("at=before_step step=1", ""),
                ("at=after_step step=11", ""),
                # As in a collective of NCCL, which does not notice that a rank is gone.
                ("at=before_step step=6", "at=before_step step=6 do=hang once={fired}-0"),
            ]
        ),
    ],
)
def test_an_error_of_one_rank_ends_all(
    model: Path, store: Path, environment: dict[str, str], tmp_path: Path, place: str, others: str
) -> None:
    """Rank 1 alone meets it, while rank 0 waits in a collective. It is final, so nothing is tried again."""
    sections, fired = settings(num_workers=2), tmp_path / "fired"
    sections["workers"] = {**sections["workers"], "max_failures": 3}
    recipe = tiny_model.write_recipe(tmp_path / "recipe.yaml", model, store, **sections)
    name = place.split()[0].removeprefix("at=")
    run_id = f"one-rank-{name}".replace("_", "-") + ("-stuck" if others else "")
    armed = {VARIABLE: f"{place} rank=1 do=raise once={fired}" + (f";{others.format(fired=fired)}" if others else "")}
    done = check(run_command(tercet("train", recipe, "--run-id", run_id), {**environment, **armed}, tmp_path), code=6)
    seconds = time.time() - fired.stat().st_mtime
    assert f"tercet: {AT}{name}" in done.stdout
    assert "Traceback" not in "\n".join(line for line in done.stdout.splitlines() if " pid=" not in line)
    assert seconds < 30
    assert report(store, run_id)["num_attempts"] == 1
    assert report(store, run_id)["error"] == f"{AT}{name}"


@pytest.mark.soak
def test_an_interrupted_driver_reports_it(
    model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Ctrl-C comes in the middle of a step. Ray Train's own handler would end the driver with exit code 1."""
    recipe = tiny_model.write_recipe(tmp_path / "recipe.yaml", model, store, **settings())
    log, fired = tmp_path / "log", tmp_path / "fired"
    armed = {VARIABLE: f"at=after_backward step=6 do=hang once={fired}"}
    with log.open("w") as out:
        driver = subprocess.Popen(
            tercet("train", recipe, "--run-id", "interrupted"), env={**environment, **armed}, stdout=out, stderr=out
        )
    try:
        wait_until(fired.exists, driver)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=400) == 130
    finally:
        driver.kill()
    assert "tercet: interrupted; the same command resumes" in log.read_text()
    assert report(store, "interrupted")["status"] == "failed"


def test_a_driver_dies_while_publishing(model: Path, store: Path, environment: dict[str, str], tmp_path: Path) -> None:
    recipe = tiny_model.write_recipe(tmp_path / "recipe.yaml", model, store, **settings())
    command = tercet("train", recipe, "--run-id", "publishing")
    armed = {VARIABLE: f"at=before_publish once={tmp_path / 'fired'}"}
    died = run_command(command, {**environment, **armed}, tmp_path)
    assert (tmp_path / "fired").exists(), died.stdout[-3000:]
    storage = open_storage(str(store))
    assert (store / "runs/publishing/best/model.safetensors").exists()
    assert read_best(storage, "publishing") is None  # it does not exist without its COMMIT

    done = check(run_command(command, environment, tmp_path))
    assert "is better than the baseline" in done.stdout
    assert report(store, "publishing")["num_attempts"] == 1  # nothing was trained again
    best = read_best(storage, "publishing")
    assert best is not None
    assert load_file(store / best.folder / "model.safetensors").keys()


@pytest.mark.soak
def test_the_best_checkpoint_is_damaged(model: Path, store: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """Training had ended. The next best checkpoint is measured, published and reported."""
    sections = settings()
    sections["checkpoint"] = {"keep_last": 100}
    check(run_command(worker_of(write_plan(tmp_path, "damaged", model, store, **sections)), environment, tmp_path))
    storage = open_storage(str(store))
    best, expected = sorted(read_commits(storage, "damaged"), key=lambda commit: -commit.metrics["ndcg@10"])
    path = store / best.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    command = tercet("train", tmp_path / "damaged.yaml", "--run-id", "damaged")
    done = check(run_command(command, environment, tmp_path))
    assert (
        f"the best checkpoint, of step {best.step}, is lost; the one of step {expected.step} is used instead"
        in done.stdout
    )
    published = read_best(storage, "damaged")
    assert published is not None
    assert (published.step, report(store, "damaged")["metrics"]["best_step"]) == (expected.step, expected.step)
    events = [json.loads(line) for line in (store / "runs/damaged/events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "best checkpoint lost")
    assert (event["step"], event["taken_step"]) == (best.step, expected.step)
