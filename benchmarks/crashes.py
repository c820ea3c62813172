"""Kill a run at random, start it again, and compare the bits: how often does a crash change something?

python benchmarks/crashes.py [--trials 60] [--seed 0]

The runs are those of tests/faults: a tiny model with dropout, gradient accumulation, 22 steps, a checkpoint every 4
steps, one or two CPU workers. Each trial draws the number of workers, and the rank, place and step of one or two kills
(the second hits the resumed run), and then lets the run finish. It is compared with an undisturbed run: sha256 of
weights, optimizer, schedule and random numbers, the metrics of every evaluation, the ledger, and which checkpoints are
kept.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import tiny_model  # noqa: E402
from support.commands import check, run_command  # noqa: E402
from support.interrupted_run import CHECKPOINTS, NUM_STEPS, final_state, proof, settings  # noqa: E402
from support.workers import training_log, worker_of, write_plan  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.ingest import IngestOptions  # noqa: E402
from tercet.failpoints import VARIABLE  # noqa: E402
from tercet.storage import open_storage  # noqa: E402

AT_EVERY_STEP = ("before_step", "after_backward", "after_step")
AT_CHECKPOINTS = ("before_upload", "mid_upload", "before_commit", "after_commit")
AT_DELETIONS = {
    "mid_retention": CHECKPOINTS[:2] + CHECKPOINTS[3:-2]
}  # the last two are kept, and 11 while it is the best
AT_EVALUATIONS = {"in_evaluation": (0, 11, 22)}


def draw(rng: random.Random, num_workers: int) -> tuple[str, int, int]:
    """Draw place, step and rank of a kill. Only rank 0 commits and deletes."""
    somewhere = {**AT_EVALUATIONS, **AT_DELETIONS}
    place = rng.choice((*AT_EVERY_STEP, *AT_CHECKPOINTS, *AT_DELETIONS, *AT_EVALUATIONS))
    steps = range(1, NUM_STEPS + 1) if place in AT_EVERY_STEP else somewhere.get(place, CHECKPOINTS)
    rank = 0 if place in ("after_commit", "mid_retention") else rng.randrange(num_workers)
    return place, rng.choice(list(steps)), rank


def main() -> None:
    """Print one line for each trial, then the total."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    num_equal = num_kills = 0
    restarts: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        store = folder / "store"
        model = tiny_model.tiny_bert(folder / "model", tiny_model.all_texts(), dropout=0.1, pooler=False)
        build_version(
            [tiny_model.write_triplets(folder / "t.jsonl")],
            open_storage(str(store)),
            "tiny",
            IngestOptions(group="group"),
        )
        own = {"TERCET_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **own, "PYTHON": sys.executable}
        expected = {}
        for num_workers in (1, 2):
            plan = write_plan(folder, f"whole-{num_workers}", model, store, **settings(num_workers))
            check(run_command(worker_of(plan).command, environment, folder))
            expected[num_workers] = final_state(store, f"whole-{num_workers}")
        for trial in range(arguments.trials):
            num_workers, run_id, said = rng.choice((1, 2)), f"trial-{trial}", []
            plan = write_plan(folder, run_id, model, store, **settings(num_workers))
            for number in range(rng.choice((1, 2))):
                place, step, rank = draw(rng, num_workers)
                fired = folder / f"fired-{trial}-{number}"
                armed = f"at={place} step={step} rank={rank} once={fired}"
                run_command(worker_of(plan).command, {**environment, VARIABLE: armed}, folder)
                num_kills += fired.exists()
                said.append(f"{place} {step} rank {rank}" + ("" if fired.exists() else " (not reached)"))
            started = time.time()
            check(run_command(worker_of(plan).command, environment, folder))
            if (first_step := training_log(store, run_id)["first_step_unix_seconds"]) is not None:
                restarts.append(first_step - started)
            equal = final_state(store, run_id) == expected[num_workers]
            proof(store, folder / f"{run_id}.yaml", run_id)
            num_equal += equal
            print(
                f"{trial:>3}  {'equal' if equal else 'DIFFERENT'}  {num_workers} workers: {'; '.join(said)}", flush=True
            )
    print(f"\nseed {arguments.seed}: {num_equal} of {arguments.trials} runs equal after {num_kills} kills")
    if len(restarts) > 1:  # of a run that was killed after its last step, the last start trains nothing
        p50, p95 = (statistics.quantiles(restarts, n=20)[at] for at in (9, 18))
        print(f"from the command to the first step of the last start: p50 {p50:.1f} s, p95 {p95:.1f} s")


if __name__ == "__main__":
    main()
