"""A whole run of the demo's recipe through `ray job submit`, beside plain SentenceTransformerTrainer under torchrun.

python benchmarks/whole_run.py [--runs 3] [--precision fp32 bf16]

Two workers with one thread each on either side, interleaved, medians. Plain is benchmarks/plain_run.py, told the same
rows and settings. Seconds from the command to its end: tercet's side plans, checks, trains, commits checkpoints,
measures the model as it is read back from storage, and publishes it with a report. A Ray head waits for it, as a
cluster would; its start is not in the time. CPU seconds are of the whole machine: nothing else may run.
"""

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from cpu import machine_cpu_seconds
from launch import BIN, free_port, start_head
from tercet.cli import main as tercet_main
from tercet.config import load_config
from tercet.demo import write_triplets
from tercet.mix import load_splits, load_train_rows
from tercet.model_source import locate
from tercet.shards import build_version
from tercet.storage import open_storage
from tercet.survey import survey

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "ray_jobs/recipes/demo.yaml"
Measured = dict[str, float]


def timed(work: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    started, cpu = time.monotonic(), machine_cpu_seconds()
    result = subprocess.run(work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(result.stdout[-5000:])
    return time.monotonic() - started, machine_cpu_seconds() - cpu


def plain(folder: Path, precision: str, model: Path) -> Measured:
    """One run under torchrun."""
    out = folder / "plain.json"
    script = [str(REPOSITORY / "benchmarks/plain_run.py"), "--rows", str(folder / "rows"), "--model", str(model)]
    command = [str(BIN / "torchrun"), "--nproc-per-node=2", *script, "--out", str(out), "--precision", precision]
    wall, cpu = timed(command)
    after = json.loads(out.read_text())["after"]
    return {"wall seconds": wall, "CPU seconds": cpu, **after}


def tercet(store: Path, precision: str, port: int, number: int) -> Measured:
    """One job."""
    run_id = f"bench-{precision}-{number}"
    overrides = [f"storage.uri={store}", f"training.precision={precision}"]
    flags = [flag for override in overrides for flag in ("--set", override)]
    started, cpu = time.monotonic(), machine_cpu_seconds()
    if tercet_main(["submit", str(RECIPE), "--run-id", run_id, "--address", f"http://127.0.0.1:{port}", *flags]):
        raise SystemExit("the job failed")
    wall, used = time.monotonic() - started, machine_cpu_seconds() - cpu
    metrics = json.loads((store / f"runs/{run_id}/metrics.json").read_text())["best_test"]
    return {
        "wall seconds": wall,
        "CPU seconds": used,
        **{name: metrics[name] for name in ("ndcg@10", "triplet_accuracy")},
    }


def write_rows(store: Path, folder: Path) -> Path:
    """The splits of the recipe as JSON lines; returns where the base model lies."""
    config = load_config(RECIPE, [f"storage.uri={store}"])
    storage, plan = survey(config, "rows")
    splits = load_splits(plan, storage)
    (train,) = load_train_rows(plan, storage, splits)
    folder.mkdir()
    for name, rows in {**splits, "train": train}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = locate(config.model)
    assert model is not None
    return model


def main() -> None:
    """Interleave, then print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments = parser.parse_args()
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_worker_niceness="0",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        PATH=f"{BIN}:{os.environ['PATH']}",  # a job runs the `python` of the cluster's PATH
    )
    port, dashboard_port = free_port(), free_port()
    results: dict[str, list[Measured]] = {
        f"{side} {precision}": [] for precision in arguments.precision for side in ("plain", "tercet")
    }
    with tempfile.TemporaryDirectory(prefix="wr-") as name:
        folder = Path(name)
        store = folder / "store"
        write_triplets(folder / "triplets.jsonl")
        config = load_config(RECIPE, [f"storage.uri={store}"])
        build_version([folder / "triplets.jsonl"], open_storage(str(store)), config.dataset.name, group="group")
        model = write_rows(store, folder / "rows")
        head = start_head(port, dashboard_port, str(folder / "ray"))
        try:
            for number in range(arguments.runs):
                for who, measured in results.items():
                    side, precision = who.split()
                    if side == "plain":
                        measured.append(plain(folder, precision, model))
                    else:
                        measured.append(tercet(store, precision, dashboard_port, number))
                    print(who, measured[-1], flush=True)
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)
    print(
        f"\n{'medians of ' + str(arguments.runs):<14}"
        + "".join(f"{key:>18}" for key in ("wall s", "CPU s"))
        + "   test"
    )
    for who, measured in results.items():
        middle = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        base = results[f"plain {who.split()[1]}"]
        shown = ""
        for key in ("wall seconds", "CPU seconds"):
            ratio = statistics.median(one[key] / other[key] for one, other in zip(base, measured, strict=True))
            shown += f"{middle[key]:>10.1f} ({ratio:.2f})"
        print(f"{who:<14}{shown}   nDCG@10 {middle['ndcg@10']:.4f}, triplets {middle['triplet_accuracy']:.4f}")


if __name__ == "__main__":
    main()
