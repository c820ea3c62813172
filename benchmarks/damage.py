"""Damage one stored object in each trial: how many damaged objects are loaded silently?

python benchmarks/damage.py [--trials 500] [--seed 0]

The run is one of tests/faults (a tiny model, two CPU workers, several checkpoints, taken over once), finished. Each
trial draws an object and a kind of damage, damages a copy, and loads everything that tercet loads: see
tests/support/damage.py. Exits with 1 unless every damage was refused with a typed error, led to an older whole
checkpoint with a warning, or changed nothing.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import tiny_model  # noqa: E402
from support.commands import check, run_command  # noqa: E402
from support.damage import DAMAGES, GOOD, OUTCOMES, Run, Trial, trial  # noqa: E402
from support.interrupted_run import settings  # noqa: E402
from support.workers import worker_of, write_plan  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.ingest import IngestOptions  # noqa: E402
from tercet.storage import open_storage  # noqa: E402


def table(trials: list[Trial]) -> str:
    """Outcomes by object and damage, as a Markdown table."""
    found = Counter((one.kind, one.damage, one.outcome) for one in trials)
    lines = ["| object | " + " | ".join(DAMAGES) + " |", "|:--|" + ":--|" * len(DAMAGES)]
    for kind in sorted({one.kind for one in trials}):
        cells = [
            ", ".join(f"{found[kind, damage, o]} {o}" for o in OUTCOMES if found[kind, damage, o]) for damage in DAMAGES
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print a line for each trial that went wrong, then the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = tiny_model.tiny_bert(folder / "model", tiny_model.all_texts(), dropout=0.1, pooler=False)
        triplets = tiny_model.write_triplets(folder / "t.jsonl")
        build_version([triplets], open_storage(str(folder / "made")), "tiny", IngestOptions(group="group"))
        plan = write_plan(folder, "damaged", model, folder / "made", **settings(2))
        own = {"TERCET_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        check(run_command(worker_of(plan).command, {**os.environ, **own, "PYTHON": sys.executable}, folder))
        run = Run(folder / "run", folder / "made", "damaged", plan.with_suffix(".yaml"), triplets)
        rng, trials = random.Random(arguments.seed), []
        for number in range(arguments.trials):
            trials.append(trial(run, rng, folder / "scratch"))
            if (one := trials[-1]).outcome not in GOOD:
                print(f"{number}  {one.path}, {one.damage}: {one.said}", flush=True)
    print(table(trials))
    sums = Counter(one.outcome for one in trials)
    print(f"\nseed {arguments.seed}: {len(trials)} damages: " + ", ".join(f"{sums[name]} {name}" for name in OUTCOMES))
    return int(sum(sums[name] for name in GOOD) != len(trials))


if __name__ == "__main__":
    sys.exit(main())
