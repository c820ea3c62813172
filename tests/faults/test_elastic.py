"""Machines leave and join during a run on Ray. The run continues on those that remain, with the same batches.

Each cluster has simulated machines of its own (see machines.py), so these tests need root and `ip netns`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import tiny_model
from support.interrupted_run import NUM_STEPS, final_state, proof, settings
from support.ray_cluster import PATIENCE_SECONDS, RayCluster, Run
from support.workers import commits, training_log, wait_until
from tercet.training.ledger import read as read_ledger

pytestmark = pytest.mark.soak


def rows(store: Path, run_id: str) -> list[int]:
    """Return the ledger of the last checkpoint: what each step consumed."""
    ledger: list[int] = read_ledger(store / commits(store, run_id)[0].folder).tolist()
    return ledger


def test_a_drained_node_loses_no_step(
    cluster: RayCluster, new_run: Callable[..., Run], whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """The worker finishes and saves its step, and the run continues on another node."""
    cluster.provide(3)
    run, fired, go = new_run("drained"), tmp_path / "fired", tmp_path / "go"
    driver = run.train(cluster, f"at=before_step step=14 do=hang once={fired} until={go}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    node = cluster.machine_of(run.rank_0())
    cluster.drain(node, seconds=120)
    wait_until(lambda: cluster.num_logs_with("received preemption signal") >= 2, driver, PATIENCE_SECONDS)
    go.touch()
    output = run.ends_well(driver)
    assert "step 14 is saved; continuing elsewhere" in output
    assert "in 2 attempts" in output
    assert "trouble  1 preempted" in output
    assert training_log(store, run.run_id)["resumed_from_step"] == 14
    assert [attempt.first_step for attempt in run.attempts()] == [0, 14]
    assert final_state(store, run.run_id) == final_state(store, whole[2])
    proof(store, run.recipe, run.run_id)


def test_a_run_shrinks_and_grows(
    cluster: RayCluster, model: Path, whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """Two workers; one is lost with its node; one worker; then two again, on a new node."""
    cluster.provide(2)
    sections = settings(lease_seconds=600)
    workers = {"min": 1, "max": 2, "max_failures": 2, "grow_check_seconds": 2}
    sections["workers"] = workers
    recipe = tiny_model.write_recipe(tmp_path / "elastic.yaml", model, store, **sections)
    run, fired, fired_2, go = Run("elastic", recipe, store), *(tmp_path / name for name in ("fired", "fired-2", "go"))
    first = f"at=before_step rank=1 step=10 do=hang once={fired}"
    driver = run.train(cluster, f"{first};at=before_step rank=0 step=15 do=hang once={fired_2} until={go}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    rank_0 = cluster.machine_of(run.rank_0())
    wait_until((store / "runs/elastic/checkpoints/00000008/COMMIT").exists, driver, PATIENCE_SECONDS)
    next(node for node in cluster.nodes if node is not rank_0).kill("raylet")
    wait_until(fired_2.exists, driver, PATIENCE_SECONDS)
    assert [attempt.world_size for attempt in run.attempts()] == [2, 1]
    cluster.provide(2)
    wait_until(lambda: len(run.attempts()) == 3, driver, PATIENCE_SECONDS)
    go.touch()
    output = run.ends_well(driver)
    assert "22 steps on 2 workers, in 3 attempts" in output
    assert [attempt.world_size for attempt in run.attempts()] == [2, 1, 2]
    assert rows(store, run.run_id) == rows(store, whole[2])
    assert commits(store, run.run_id)[0].step == NUM_STEPS
    assert len(proof(store, run.recipe, run.run_id).attempts) == 3
