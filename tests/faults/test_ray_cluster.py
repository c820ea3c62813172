"""Ray loses a node, the controller, the driver, the head, or a network link. The result of the run does not change.

Each cluster has simulated machines of its own (see machines.py), so these tests need root and `ip netns`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.interrupted_run import final_state, proof
from support.ray_cluster import CONTROLLER, PATIENCE_SECONDS, RayCluster, Run
from support.workers import training_log, wait_until
from tercet.failpoints import VARIABLE

pytestmark = pytest.mark.soak


def test_a_node_is_lost(
    cluster: RayCluster, new_run: Callable[..., Run], whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """The node of rank 0 dies during an upload. The run continues on the other node and a third one."""
    cluster.provide(3)
    run, fired = new_run("node-lost"), tmp_path / "fired"
    driver = run.train(cluster, f"at=mid_upload step=12 do=hang once={fired}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    node = cluster.machine_of(run.rank_0())
    node.kill("raylet")
    assert "in 2 attempts" in run.ends_well(driver)
    assert node.named("ray::") == []  # the worker died with its node
    assert training_log(store, run.run_id)["resumed_from_step"] == 11
    assert final_state(store, run.run_id) == final_state(store, whole[2])
    proof(store, run.recipe, run.run_id)


def test_the_controller_dies(
    cluster: RayCluster, new_run: Callable[..., Run], whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """It dies in the middle of a step. Ray does not start another, so the command says what to do."""
    cluster.provide(2)
    run, fired = new_run("no-controller"), tmp_path / "fired"
    driver = run.train(cluster, f"at=after_backward step=9 rank=1 do=hang once={fired}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    cluster.head.kill(CONTROLLER)
    code, output = run.ends(driver)
    assert code == 6
    assert "tercet: Ray Train's controller is lost" in output
    assert "→ run the same command again: the run resumes from its last checkpoint" in output
    assert "Traceback" not in of_the_command(output)

    run.ends_well(run.train(cluster))
    assert final_state(store, run.run_id) == final_state(store, whole[2])
    proof(store, run.recipe, run.run_id)


def test_the_driver_dies(
    cluster: RayCluster, new_run: Callable[..., Run], whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """Ray ends its workers. The next driver does not wait for their lease, which nobody holds any more."""
    cluster.provide(2)
    run, fired = new_run("no-driver"), tmp_path / "fired"
    driver = run.train(cluster, f"at=before_commit step=16 do=hang once={fired}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    driver.kill()
    run.ends_well(run.train(cluster))
    assert training_log(store, run.run_id)["resumed_from_step"] == 12
    assert final_state(store, run.run_id) == final_state(store, whole[2])
    proof(store, run.recipe, run.run_id)


def test_a_node_is_cut_off_and_comes_back(
    cluster: RayCluster, new_run: Callable[..., Run], whole: dict[int, str], store: Path, tmp_path: Path
) -> None:
    """Its worker survives, still reaches storage, and commits after another worker has taken over. The late commit is
    replaced: the other worker is held before it commits the same step, so that it finds the late one."""
    cluster.provide(2)
    run = new_run("node-cut-off", num_workers=1)
    held, go, held_2, go_2 = (tmp_path / name for name in ("held", "go", "held-2", "go-2"))
    held_2.touch()  # so the first attempt is not held here
    first = f"at=before_commit step=12 do=hang once={held} until={go}"
    driver = run.train(cluster, f"{first};at=before_upload step=12 do=hang once={held_2} until={go_2}")
    wait_until(held.exists, driver, PATIENCE_SECONDS)
    worker = psutil.Process(run.rank_0())
    node = cluster.machine_of(worker.pid)
    held_2.unlink()
    node.cut()
    wait_until(held_2.exists, driver, PATIENCE_SECONDS)
    attempts = run.attempts()
    assert [attempt.first_step for attempt in attempts] == [0, 11]
    assert worker.is_running()
    go.touch()
    commit = store / "runs" / run.run_id / "checkpoints/00000012/COMMIT"
    wait_until(commit.exists, driver, PATIENCE_SECONDS)
    assert attempts[0].name in commit.read_text()
    node.reconnect()
    worker.wait(timeout=PATIENCE_SECONDS)  # Ray shuts down a node that it has given up
    go_2.touch()
    assert "step 12 was committed by another attempt, but that came too late; it is replaced" in run.ends_well(driver)
    assert final_state(store, run.run_id) == final_state(store, whole[1])
    assert len(proof(store, run.recipe, run.run_id).attempts) == 2


def test_the_head_is_lost_twice(
    new_cluster: Callable[..., RayCluster],
    new_run: Callable[..., Run],
    whole: dict[int, str],
    store: Path,
    tmp_path: Path,
) -> None:
    """First only Ray's process on it dies, during `tercet train`; then the whole machine, during a job. On a new
    cluster, the same run resumes."""
    run = new_run("no-head", num_workers=1, lease_seconds=30)
    first, fired = new_cluster(), tmp_path / "fired"
    first.provide(1)
    driver = run.train(first, f"at=in_evaluation step=11 do=hang once={fired}")
    wait_until(fired.exists, driver, PATIENCE_SECONDS)
    wait_until((store / "runs/no-head/checkpoints/00000008/COMMIT").exists, driver, PATIENCE_SECONDS)
    first.head.kill("gcs_server")
    code, output = run.ends(driver)
    assert code != 0
    assert "tercet: the head of the Ray cluster" in output
    assert "→ start the cluster again, then run the same command: the run resumes from its last checkpoint" in output
    assert "Traceback" not in of_the_command(output)

    second, fired = new_cluster(dashboard=True), tmp_path / "fired-2"
    second.provide(1)
    job = submit(run, second, f"at=after_step step=14 do=hang once={fired}")
    wait_until(fired.exists, job, PATIENCE_SECONDS)
    wait_until((store / "runs/no-head/checkpoints/00000011/COMMIT").exists, job, PATIENCE_SECONDS)
    second.switch_off()
    code, output = run.ends(job)
    assert code == 7
    assert "tercet: the cluster stopped answering" in output
    assert "→ submit again when it is back: no-head resumes from its last checkpoint" in output

    third = new_cluster(dashboard=True)
    third.provide(1)
    run.ends_well(submit(run, third))
    assert final_state(store, run.run_id) == final_state(store, whole[1])
    assert len(proof(store, run.recipe, run.run_id).attempts) == 3


def of_the_command(output: str) -> str:
    """Return the command's own output. Ray's threads in other processes end with a traceback when the head is lost."""
    return "\n".join(line for line in output.splitlines() if " pid=" not in line)


def submit(run: Run, cluster: RayCluster, armed: str = "") -> subprocess.Popen[bytes]:
    """Start `tercet submit` on the laptop, with less patience for a silent head."""
    impatient = (
        "import sys; from tercet.cli.main import main; from tercet.cluster import jobs; "
        "jobs.UNREACHABLE_SECONDS = 20; sys.exit(main())"
    )
    command = [sys.executable, "-c", impatient, "submit", str(run.recipe), "--run-id", run.run_id]
    variables = {VARIABLE: armed} if armed else {}
    return cluster.start(
        [*command, "--address", cluster.dashboard], run.recipe.with_suffix(".log"), variables, cluster.laptop
    )
