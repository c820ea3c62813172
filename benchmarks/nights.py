"""Ten nights in a row on real data that grows: what is promoted, what is not, and what a bad night costs.

python benchmarks/nights.py [--triplets FILE] [--first-rows 1500] [--rows-a-night 300] [--seed 0] [--nights 10]

The model of the demo, on the docstrings of the standard library or on a file of triplets with a group. Each night is a
process of its own, as cron would start it, dated one day later. One night brings rows with shuffled positives;
afterwards the dataset is rolled back. One is killed in the middle of its training and started again. One brings no
rows.
"""

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tercet.cli.demo_data import stdlib_triplets
from tercet.config.examples import example_path
from tercet.config.recipe import load_config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.versions import publish, read_manifest
from tercet.pipeline.nightly import Night, nightly
from tercet.planning.survey import read_report
from tercet.storage import Storage, open_storage

WHAT = ("first rows", "new rows", "new rows", "poisoned", "new rows", "killed", "nothing new", *["new rows"] * 3)
FIRST_DAY = datetime.datetime(2026, 1, 1, 22, tzinfo=datetime.UTC)
Row = dict[str, str]


def triplets_by_group(source: Path | None, rng: random.Random) -> list[Row]:
    """Rows of a file or of the demo, whole groups at a time in a random order, as documents arrive."""
    text = source.read_text().splitlines() if source else []
    rows: list[Row] = [json.loads(found) for found in text] or stdlib_triplets()
    groups = sorted({row["group"] for row in rows})
    place = dict(zip(rng.sample(groups, len(groups)), range(len(groups)), strict=True))
    return sorted(rows, key=lambda row: place[row["group"]])


def recipe(store: Path, incoming: Path) -> str:
    """The demo's recipe, with the sections of a night."""
    document = yaml.safe_load(example_path("demo").read_text())
    document["name"] = "nights"
    document["storage"] = {"uri": str(store)}
    document["dataset"] = {"name": "growing", "replay": {"new_share": 0.5}}
    document["model"]["start_from"] = "champion"
    # 16: with batches of 32, a night's 928 rows were 29 batches, and one text was in more rows than that.
    document["training"] |= {"learning_rate": 5e-5, "log_every_steps": 1, "global_batch_size": 16}
    del document["training"]["max_train_rows"]
    document["nightly"] = {"sources": [str(incoming / "*.jsonl")], "group": "group"}
    return yaml.safe_dump(document)


def poisoned(rows: list[Row], rng: random.Random) -> list[Row]:
    """Give each anchor the positive of another row."""
    others = rng.sample(rows, len(rows))
    pairs = zip(rows, others, strict=True)
    return [{**row, "positive": other["positive"]} for row, other in pairs if other["positive"] != row["negative"]]


def write(path: Path, rows: list[Row]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def do_night(recipe_path: Path, day: int, log: Path, kill_at_step: int | None = None) -> None:
    """Run a night in a process of its own; with `kill_at_step`, send it SIGKILL once that step is in its log."""
    command = [sys.executable, __file__, "--do", str(recipe_path), str(day)]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while kill_at_step is not None and process.poll() is None:
            if f" step {kill_at_step}/" in log.read_text(errors="replace"):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.1)
        assert process.wait() == 0, log.read_text(errors="replace")[-5000:]


def line(number: int, what: str, night: Night, storage: Storage, seconds: float) -> str:
    """One row of the table."""
    values = {who.partition("-")[0]: found["ndcg@10"] for who, found in night.metrics.items()}
    numbers = "".join(
        f"{values[who]:>10.4f}" if who in values else f"{'':>10}" for who in ("base", "champion", "candidate")
    )
    report = None if night.outcome == "nothing_to_do" else read_report(storage, night.run_id)
    attempts = report.num_attempts if report else 0
    return f"{number:>2}  {what:<12}{night.outcome:<14}{night.champion or '':>3}{numbers}{attempts:>10}{seconds:>8.0f}"


def main() -> None:
    """Print one line for each night."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--triplets", type=Path)
    parser.add_argument("--first-rows", type=int, default=1500)
    parser.add_argument("--rows-a-night", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nights", type=int, default=len(WHAT))
    parser.add_argument("--do", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do is not None:
        now = FIRST_DAY + datetime.timedelta(days=int(arguments.do[1]))
        night = nightly(load_config(Path(arguments.do[0])), "benchmark", print, now)
        Path(arguments.do[0]).with_name("night.json").write_text(night.model_dump_json())
        return
    rng = random.Random(arguments.seed)
    rows = triplets_by_group(arguments.triplets, rng)
    with tempfile.TemporaryDirectory(prefix="nights-") as name:
        folder = Path(name)
        store, incoming, path = folder / "store", folder / "incoming", folder / "recipe.yaml"
        incoming.mkdir()
        path.write_text(recipe(store, incoming))
        storage = open_storage(str(store))
        write(folder / "first.jsonl", rows[: arguments.first_rows])
        fractions = (0.5, 0.1, 0.4)  # a small dataset needs a large test split
        build_version([folder / "first.jsonl"], storage, "growing", IngestOptions(group="group"), fractions=fractions)
        used = arguments.first_rows
        print(
            f"{'':>4}{'':<12}{'outcome':<14}{'gen':>3}{'base':>10}{'champion':>10}{'candidate':>10}{'attempts':>10}{'s':>8}"
        )
        for number, what in enumerate(WHAT[: arguments.nights], start=1):
            before = read_manifest(storage, "growing")
            if what not in ("first rows", "nothing new"):
                new = rows[used : used + arguments.rows_a_night]
                used += len(new)
                write(incoming / f"{number:02}.jsonl", poisoned(new, rng) if what == "poisoned" else new)
            log, began = folder / f"{number}.log", time.monotonic()
            if what == "killed":
                do_night(path, number, log, kill_at_step=5)
            do_night(path, number, log)
            night = Night.model_validate_json((folder / "night.json").read_text())
            print(line(number, what, night, storage, time.monotonic() - began), flush=True)
            print(f"      {night.sentence}", flush=True)
            if night.warning is not None:
                print(f"      Warning: {night.warning}", flush=True)
            if what == "poisoned":  # a user notices, and rolls the dataset back
                (incoming / f"{number:02}.jsonl").unlink()
                publish(storage, before)


if __name__ == "__main__":
    main()
