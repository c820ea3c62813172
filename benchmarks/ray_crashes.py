"""Kill what a run on Ray depends on, start it again, and compare the bits: how often does a loss change something?

python benchmarks/ray_crashes.py [--trials 60] [--seed 0] [--results ray-crashes.jsonl]     as root, with `ip netns`

The runs are those of tests/faults, on a cluster of separate machines: a head, where the driver runs, and three nodes
with room for one of the two workers each. The trials take turns in what they kill: a rank, the raylet of a node with a
rank, the driver, Ray Train's controller, the whole machine of the head. Place, step and rank are drawn; that rank (or
the driver, before it publishes) is held there until the kill. If the command dies, it is given again; after a loss of
the head, on a fresh cluster, while the nodes of the old one still run.

Each run is compared with an undisturbed one: sha256 of weights, optimizer, schedule and random numbers, the metrics of
every evaluation, the ledger, and which checkpoints are kept. Trials that are already in --results are not repeated.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from crashes import draw  # noqa: E402
from support import tiny_model  # noqa: E402
from support.commands import check, run_command, tercet  # noqa: E402
from support.interrupted_run import final_state, proof, settings  # noqa: E402
from support.ray_cluster import CONTROLLER, WORKER, RayCluster, ray_cluster  # noqa: E402
from support.workers import training_log, wait_until, worker_of, write_plan  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.ingest import IngestOptions  # noqa: E402
from tercet.failpoints import VARIABLE  # noqa: E402
from tercet.storage import open_storage  # noqa: E402

TARGETS = ("rank", "raylet", "driver", "controller", "head")
RAY_GOES_ON = ("rank", "raylet")  # without another command
NUM_WORKERS = 2
NUM_NODES = 3
PATIENCE_SECONDS = 300


@dataclass(frozen=True)
class Trial:
    """What is killed and where, the outcome, and the seconds from the kill to the next first step, if any."""

    seed: int
    number: int
    target: str
    place: str
    outcome: str = ""
    recovery_seconds: float | None = None


def plan_trial(seed: int, number: int) -> Trial:
    """Draw a trial from its own seed, so that any trial can be repeated alone."""
    rng, target = random.Random(f"{seed}-{number}"), TARGETS[number % len(TARGETS)]
    if target in ("driver", "head") and rng.random() < 0.1:
        return Trial(seed, number, target, "at=before_publish")
    place, step, rank = draw(rng, NUM_WORKERS)
    return Trial(seed, number, target, f"at={place} step={step} rank={rank}")


def kill(target: str, cluster: RayCluster, driver: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the target. A rank has killed itself."""
    if target == "raylet":
        next(node for node in cluster.nodes if node.named(WORKER)).kill("raylet")
    elif target == "driver":
        driver.kill()
    elif target == "controller":
        cluster.head.kill(CONTROLLER)
    elif target == "head":
        cluster.head.kill_all()


class Bench:
    """A store, the undisturbed run, and the present cluster."""

    def __init__(self, folder: Path, clusters: ExitStack) -> None:
        self._folder, self._store, self._clusters = folder, folder / "store", clusters
        self._model = tiny_model.tiny_bert(folder / "model", tiny_model.all_texts(), dropout=0.1, pooler=False)
        triplets = tiny_model.write_triplets(folder / "t.jsonl")
        build_version([triplets], open_storage(str(self._store)), "tiny", IngestOptions(group="group"))
        own = {"TERCET_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        self._environment = {**os.environ, **own, "PATH": path, "PYTHON": sys.executable}
        plan = write_plan(folder, "whole", self._model, self._store, **settings(NUM_WORKERS))
        check(run_command(worker_of(plan).command, self._environment, folder))
        self._expected = final_state(self._store, "whole")
        self._cluster = self._new_cluster()

    def _new_cluster(self) -> RayCluster:
        return self._clusters.enter_context(ray_cluster(self._environment))

    def run(self, trial: Trial) -> Trial:
        """Run the trial and return it with its outcome."""
        run_id, cluster = f"trial-{trial.number}", self._cluster
        sections = settings(NUM_WORKERS, lease_seconds=30)
        sections["workers"] = {**sections["workers"], "max_failures": 3, "start_timeout_seconds": PATIENCE_SECONDS}
        recipe = tiny_model.write_recipe(self._folder / f"{run_id}.yaml", self._model, self._store, **sections)
        try:
            killed_at = self._kill_and_go_on(trial, recipe, run_id)
            outcome = "equal" if final_state(self._store, run_id) == self._expected else "DIFFERENT"
            proof(self._store, recipe, run_id)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            self._cluster = self._new_cluster()
            return replace(trial, outcome=f"FAILED: {type(error).__name__}: {str(error)[-2000:]}")
        finally:
            if cluster is not self._cluster:
                cluster.switch_off()
        first_step = training_log(self._store, run_id)["first_step_unix_seconds"]
        recovery = first_step - killed_at if first_step is not None and first_step > killed_at else None
        return replace(trial, outcome=outcome, recovery_seconds=recovery)

    def _kill_and_go_on(self, trial: Trial, recipe: Path, run_id: str) -> float:
        """Return the time of the kill. The run has finished by then."""
        self._cluster.provide(NUM_NODES)
        log, fired = self._folder / f"{run_id}.log", self._folder / f"{run_id}.fired"
        command = tercet("train", recipe, "--run-id", run_id)
        do = "kill" if trial.target == "rank" else "hang"
        driver = self._cluster.start(command, log, {VARIABLE: f"{trial.place} do={do} once={fired}"})
        wait_until(fired.exists, driver, PATIENCE_SECONDS)
        killed_at = time.time()
        kill(trial.target, self._cluster, driver)
        code = driver.wait(timeout=PATIENCE_SECONDS)
        assert (code == 0) == (trial.target in RAY_GOES_ON), log.read_text()
        if code != 0:
            if trial.target == "head":
                self._cluster = self._new_cluster()
                self._cluster.provide(NUM_NODES)
            again = self._cluster.start(command, log)
            assert again.wait(timeout=PATIENCE_SECONDS) == 0, log.read_text()
        return killed_at


def table(trials: list[Trial]) -> str:
    """Print one line for each target."""
    lines = [f"{'killed':<12}{'equal':>9}{'p50 s':>8}{'p95 s':>8}   from the kill to the next first step"]
    for target in (*TARGETS, "all"):
        mine = [trial for trial in trials if target in (trial.target, "all")]
        equal = sum(trial.outcome == "equal" for trial in mine)
        seconds = [trial.recovery_seconds for trial in mine if trial.recovery_seconds is not None]
        quantiles = statistics.quantiles(seconds, n=20) if len(seconds) > 1 else seconds * 19 or [math.nan] * 19
        lines.append(f"{target:<12}{f'{equal}/{len(mine)}':>9}{quantiles[9]:>8.1f}{quantiles[18]:>8.1f}")
    return "\n".join(lines)


def main() -> None:
    """Print one line for each trial, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=Path("ray-crashes.jsonl"), help="file of earlier trials, which are not repeated"
    )
    arguments = parser.parse_args()
    known = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    trials = [trial for trial in (Trial(**json.loads(line)) for line in known) if trial.seed == arguments.seed]
    done = {trial.number for trial in trials}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as clusters:
        bench = Bench(Path(folder), clusters)
        for number in range(arguments.trials):
            if number in done:
                continue
            trial = bench.run(plan_trial(arguments.seed, number))
            trials.append(trial)
            with arguments.results.open("a") as results:
                results.write(json.dumps(asdict(trial)) + "\n")
            seconds = "" if trial.recovery_seconds is None else f"  {trial.recovery_seconds:.1f} s"
            print(f"{number:>3}  {trial.outcome}  {trial.target}: {trial.place}{seconds}", flush=True)
    print(f"\nseed {arguments.seed}\n{table(trials)}")


if __name__ == "__main__":
    main()
