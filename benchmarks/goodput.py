"""The share of wall time that is useful training while workers keep dying.

python benchmarks/goodput.py [--mean-seconds 300] [--minutes 20] [--step-seconds 0.5] [--every-steps 20] [--seed 0]

A tiny model on two CPU workers under Ray, which restarts them. Each step includes a pause, so that its length is known
and does not depend on the machine. `--minutes` of steps are trained twice: undisturbed, and with SIGKILL to a random
rank at the times of a Poisson process, `--mean-seconds` apart on average. A kill that finds no worker, because they are
being started, waits until there is one.

Prints for both: distinct steps times the median step, divided by the seconds of the whole command. Everything else that
the command does counts as lost: starting Ray and its workers, evaluations, checkpoints that training waits for, and
publishing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import tiny_model  # noqa: E402
from support.interrupted_run import final_state  # noqa: E402
from support.workers import make_plan  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.storage import open_storage  # noqa: E402

NUM_WORKERS = 2
NUM_ROWS = 2000  # about 100 steps an epoch
WORKER = "ray::RayTrainWorker"


def rest_at_each_step(steps: str, rest_seconds: float, loop_config: dict[str, str]) -> Any:
    """The worker's loop with a pause at each step, and a line in the file `steps` for each step."""
    from tercet.cluster import train
    from tercet.training import callbacks

    class Resting(callbacks.RunRecorder):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            time.sleep(rest_seconds)
            if args.process_index == 0:
                with Path(steps).open("a") as file:
                    file.write(f"{os.getpid()} {state.global_step} {time.time()}\n")

    callbacks.RunRecorder = Resting
    return train._train_loop(loop_config)


def drive(recipe: str, run_id: str, steps: str, rest_seconds: float) -> int:
    """Run `tercet train` with that loop."""
    from tercet.cli import main
    from tercet.cluster import train

    train._train_loop = functools.partial(rest_at_each_step, steps, rest_seconds)
    return main.main(["train", recipe, "--run-id", run_id])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Figures of one command."""

    wall_seconds: float
    num_kills: int
    num_steps: int
    num_distinct_steps: int
    median_step_seconds: float

    def text(self) -> str:
        productive = self.num_distinct_steps * self.median_step_seconds
        return (
            f"{productive / self.wall_seconds:.3f} = {self.num_distinct_steps} steps * {self.median_step_seconds:.3f} s"
            f" / {self.wall_seconds:.0f} s; {self.num_kills} kills,"
            f" {self.num_steps - self.num_distinct_steps} steps repeated"
        )


def run(
    folder: Path, recipe: Path, run_id: str, rest_seconds: float, kills: random.Random | None, mean: float
) -> Outcome:
    """Train to the end, killing workers meanwhile."""
    steps, log = folder / f"{run_id}.steps", folder / f"{run_id}.log"
    command = [sys.executable, __file__, "--drive", str(recipe), run_id, str(steps), str(rest_seconds)]
    own = {"TERCET_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    started, num_kills = time.monotonic(), 0
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **own}, cwd=folder, stdout=out, stderr=out)
    try:
        next_kill = time.monotonic() + kills.expovariate(1 / mean) if kills else float("inf")
        while process.poll() is None:
            if time.monotonic() > next_kill and (workers := ranks(process.pid)):
                kills.choice(workers).kill()
                num_kills += 1
                next_kill = time.monotonic() + kills.expovariate(1 / mean)
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait(timeout=60)
    wall_seconds = time.monotonic() - started
    assert process.returncode == 0, log.read_text()[-5000:]
    lines = [line.split() for line in steps.read_text().splitlines()]
    lengths = [
        float(end) - float(begin)
        for (pid, _, begin), (same_pid, _, end) in itertools.pairwise(lines)
        if pid == same_pid
    ]
    distinct = {step for _, step, _ in lines}
    return Outcome(wall_seconds, num_kills, len(lines), len(distinct), statistics.median(lengths))


def ranks(driver: int) -> list[psutil.Process]:
    """Process ids of a driver's training workers, found by the process titles that Ray sets."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if (process.cmdline() or [""])[0].startswith(WORKER):
                    found.append(process)
    return found


def main() -> None:
    """Run both, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mean-seconds", type=float, default=300, help="mean time between two kills")
    parser.add_argument("--minutes", type=float, default=20, help="of training")
    parser.add_argument("--step-seconds", type=float, default=0.5)
    parser.add_argument("--every-steps", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, store = Path(name), Path(name) / "store"
        model = tiny_model.tiny_bert(folder / "model", tiny_model.all_texts(), dropout=0.1, pooler=False)
        build_version([tiny_model.write_triplets(folder / "t.jsonl", NUM_ROWS)], open_storage(str(store)), "tiny")
        sections: dict[str, dict[str, Any]] = {
            "training": {"num_epochs": 1},
            "checkpoint": {"keep_last": 2, "every_steps": arguments.every_steps},
            "workers": {"num_workers": NUM_WORKERS, "max_failures": 1_000_000},
        }
        recipe = tiny_model.write_recipe(folder / "recipe.yaml", model, store, **sections)
        steps_per_epoch = make_plan(recipe, "plan").num_steps
        sections["training"]["num_epochs"] = max(
            round(arguments.minutes * 60 / arguments.step_seconds / steps_per_epoch), 1
        )
        tiny_model.write_recipe(recipe, model, store, **sections)
        rest_seconds, mean = arguments.step_seconds, arguments.mean_seconds
        print(
            f"left alone                   {run(folder, recipe, 'whole', rest_seconds, None, mean).text()}", flush=True
        )
        rng = random.Random(arguments.seed)
        killed = run(folder, recipe, "killed", rest_seconds, rng, mean)
        print(f"a kill every {mean:.0f} s, seed {arguments.seed}    {killed.text()}")
        print(f"equal results: {final_state(store, 'killed') == final_state(store, 'whole')}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        sys.exit(drive(*sys.argv[2:5], float(sys.argv[5])))
    main()
