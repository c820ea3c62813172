"""Seconds from a cold machine to the first batch, beside the bare download of the same shards, and memory.

python benchmarks/cold_data.py [--rows 1000000] [--rounds 3] [--local]

Random triplets with the text lengths of a published triplet model, sharded into Ceph's gateway on loopback (or, with
`--local`, into a folder). Each measurement is a process of its own with an empty cache; measurements are interleaved.
`download` is boto3 with 8 threads. `first batch` is what a worker does: it downloads and verifies the shards, unpacks
them to be memory-mapped, numbers the texts so that no batch holds one twice, and reads the first 512 rows. Memory is
the growth of that process's anonymous pages (memory-mapped pages can be dropped at any time) until 200 batches from all
over the epoch were read.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from support.s3_server import Gateway  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.versions import read_manifest  # noqa: E402
from tercet.storage import Storage, open_storage  # noqa: E402

BATCH_SIZE = 512
NUM_BATCHES = 200
# Characters of a column: about four a token of the lengths in step.py.
MEAN_CHARS = {"anchor": 60, "positive": 105, "negative": 82}


def write_rows(path: Path, num_rows: int) -> None:
    """Write rows: three for each anchor; every other text is unique."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    pools = {
        column: [" ".join(draw.choices(words, k=round(chars / 6.5) - 1)) for _ in range(20_000)]
        for column, chars in MEAN_CHARS.items()
    }
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            numbers = {"anchor": number // 3, "positive": number, "negative": number}
            texts = (f'"{column}": "{pools[column][n % 20_000]} {n}"' for column, n in numbers.items())
            file.write("{" + ", ".join(texts) + "}\n")


def anonymous_bytes() -> int:
    """Anonymous pages of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not report its memory")


def download(storage: Storage, uri: str, folder: Path) -> dict[str, float]:
    """Download the shards of the train split with boto3."""
    import boto3

    manifest = read_manifest(storage, "bench")
    client = boto3.client("s3", endpoint_url=os.environ["BENCH_ENDPOINT"], region_name="us-east-1")
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    keys = [manifest.key_of(shard) for shard in manifest.splits["train"]]
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.download_file(bucket, f"{prefix}/{key}", str(folder / Path(key).name)), keys))
    return {"seconds": time.monotonic() - started}


def first_batch(storage: Storage, folder: Path) -> dict[str, float]:
    """Prepare the first batch as `run_worker` does."""
    import datasets  # noqa: F401  # a worker has imported it already
    import pyarrow.parquet  # noqa: F401

    from tercet.data.cache import load_split
    from tercet.data.order import DatasetRows, RankBatches, num_steps_per_epoch
    from tercet.data.text_stats import estimated_tokens, text_ids

    manifest = read_manifest(storage, "bench")
    before, started = anonymous_bytes(), time.monotonic()
    rows = load_split(storage, manifest, "train", folder, ["anchor", "positive", "negative"])
    loaded = time.monotonic()
    num_steps = num_steps_per_epoch(len(rows), BATCH_SIZE)
    batches = RankBatches(
        [DatasetRows(len(rows), num_steps, text_ids(rows))], BATCH_SIZE, 1, 0, 1, 0, estimated_tokens(rows, 256)
    )
    first = rows[next(iter(batches))]
    assert len(first["anchor"]) == BATCH_SIZE
    done = time.monotonic()
    batches.skip(max(num_steps - NUM_BATCHES, 0))
    for numbers in batches:
        if numbers:
            rows[numbers]
    return {
        "seconds": done - started,
        "load": loaded - started,
        "first": done - loaded,
        "memory_bytes": anonymous_bytes() - before,
    }


def measure(what: str, uri: str) -> dict[str, float]:
    """Measure in a new process with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="cold-") as folder:
        command = [sys.executable, __file__, "--work", what, "--uri", uri, "--folder", folder]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(found.splitlines()[-1]))


def main() -> None:
    """Interleave the measurements, then print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        storage = open_storage(arguments.uri, os.environ.get("BENCH_ENDPOINT"))
        if arguments.work == "download":
            print(json.dumps(download(storage, arguments.uri, arguments.folder)))
        else:
            print(json.dumps(first_batch(storage, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, gateway = Path(name), None
        if arguments.local:
            uri = str(folder / "store")
        else:
            gateway = Gateway(folder / "rgw")
            server = gateway.start(die_with_parent=True)
            own = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
            os.environ.update(own, AWS_EC2_METADATA_DISABLED="true", NO_PROXY="127.0.0.1")
            os.environ["BENCH_ENDPOINT"] = server.endpoint_url
            uri = f"{server.new_bucket()}/p"
        try:
            write_rows(folder / "rows.jsonl", arguments.rows)
            storage = open_storage(uri, os.environ.get("BENCH_ENDPOINT"))
            build_version([folder / "rows.jsonl"], storage, "bench")
            (folder / "rows.jsonl").unlink()
            shards = read_manifest(storage, "bench").splits["train"]
            print(
                f"{arguments.rows:,} rows; train: {len(shards)} shards, {sum(s.num_bytes for s in shards) / 1e6:.0f} MB"
            )
            ways = ["first batch"] if arguments.local else ["download", "first batch"]
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way in ways:
                    found[way].append(measure(way, uri))
        finally:
            if gateway is not None:
                gateway.stop()
    for way, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        memory = middle.pop("memory_bytes", None)
        shown = ", ".join(f"{key} {value:.2f} s" for key, value in middle.items())
        print(f"{way:<12} {shown}" + ("" if memory is None else f"; {memory / 1e6:.0f} MB more memory"))
    if not arguments.local:
        pairs = zip(found["first batch"], found["download"], strict=True)
        print(f"first batch / download: {statistics.median(x['seconds'] / y['seconds'] for x, y in pairs):.2f}")


if __name__ == "__main__":
    main()
