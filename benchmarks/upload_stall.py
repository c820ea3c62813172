"""The share of training time that uploads of checkpoints take.

python benchmarks/upload_stall.py [--steps 60] [--every 10] [--hidden 512] [--rounds 3] [--put-seconds 0.05] [--no-s3]

One CPU worker trains a randomly initialised BERT of width --hidden with 6 layers (19 million weights by default, 76 MB;
a checkpoint with the optimizer's state is three times that). Each round runs it three times: without checkpoints, with
one every --every steps to a local folder, and the same to a real S3 server on this machine behind a proxy that delays
each PUT by --put-seconds. Measured from the second step to the last, medians over rounds:

    stall    seconds in which `Uploader.submit` holds the training thread. It queues one checkpoint behind the one that
             is being uploaded, and waits if there are two: so uploads must not take longer than the steps between them
    save     seconds to write the checkpoint to the local disk, for which training waits as well
    CPU      seconds of all cores and threads of the worker for a checkpoint: those of the run, less those of the run
             without checkpoints in the same round, divided by the checkpoints
    steps/s  with everything: on a machine without idle cores an upload also slows the steps beside it
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import tiny_model  # noqa: E402
from support.commands import check, run_command  # noqa: E402
from support.s3_server import FaultyProxy, Gateway, S3Server  # noqa: E402
from support.workers import make_plan  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.ingest import IngestOptions  # noqa: E402
from tercet.storage import open_storage  # noqa: E402

BATCH = 16
RESULT = "upload-stall "


def work(plan: str) -> None:
    """Run the worker with a clock at each place, and print the measurements."""
    from tercet.artifacts.uploader import Uploader
    from tercet.cli.main import main
    from tercet.training import callbacks, trainer

    submits, saves, steps, cpu = [], [], [], []

    class Clocked(callbacks.RunRecorder):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            super().on_step_end(args, state, control, **kwargs)
            steps.append(time.perf_counter())
            cpu.append(time.process_time())

    def timed(method: object, into: list[float]) -> object:
        def around(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if len(steps) < num_steps:  # the one after the last step is not measured
                    into.append(time.perf_counter() - started)

        return around

    num_steps = json.loads(Path(plan).read_text())["num_steps"]
    callbacks.RunRecorder = Clocked
    trainer.TercetTrainer._save_checkpoint = timed(trainer.TercetTrainer._save_checkpoint, saves)
    Uploader.submit = timed(Uploader.submit, submits)
    main(["worker", plan])
    seconds = steps[-1] - steps[1]
    # What the last checkpoint before the end still costs counts too: the process is asked after its end.
    process = time.process_time() - cpu[1]
    found = {"cpu": process, "seconds": seconds, "steps": len(steps) - 2, "submits": submits, "saves": saves}
    print(RESULT + json.dumps(found), flush=True)


def bert(folder: Path, hidden: int) -> Path:
    """Write a SentenceTransformer of 6 layers with random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = tiny_model.tiny_tokenizer(tiny_model.all_texts())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=6,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    encoder = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[encoder, Pooling(hidden, "mean")], device="cpu").save_pretrained(str(folder / "st"))
    return folder / "st"


def main() -> None:
    """Print a line for each run, then the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--put-seconds", type=float, default=0.05)
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = bert(folder, arguments.hidden)
        num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{num_bytes / 1e6:.0f} MB of weights, a checkpoint every {arguments.every} of {arguments.steps} steps")
        local = {"uri": str(folder / "store")}
        places = {"no checkpoints": local, "local folder": local}
        gateway = Gateway(folder / "rgw")
        try:
            if not arguments.no_s3:
                places["S3"] = s3(gateway.start(die_with_parent=True), arguments.put_seconds)
            measure(folder, model, places, arguments)
        finally:
            if not arguments.no_s3:
                gateway.stop()


def s3(server: S3Server, put_seconds: float) -> dict[str, str]:
    """The storage section for a bucket with delayed PUTs."""
    own = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    os.environ.update(own, AWS_EC2_METADATA_DISABLED="true", NO_PROXY="127.0.0.1")
    proxy = FaultyProxy(server)
    proxy.decide = lambda method, _: time.sleep(put_seconds) if method == "PUT" else None
    return {"uri": f"{server.new_bucket()}/p", "endpoint_url": proxy.endpoint_url}


def measure(folder: Path, model: Path, places: dict[str, dict[str, str]], arguments: argparse.Namespace) -> None:
    """Interleave the kinds of storage, so that other load on the machine affects all of them."""
    # 80 % of the rows are train rows; the remainder fills no batch.
    triplets = tiny_model.write_triplets(folder / "t.jsonl", round(arguments.steps * BATCH / 0.8 * 1.1))
    for storage in {place["uri"]: place for place in places.values()}.values():
        build_version(
            [triplets], open_storage(storage["uri"], storage.get("endpoint_url")), "tiny", IngestOptions(group="group")
        )
    own = {"TERCET_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, float]]] = {place: [] for place in places}
    for number in range(arguments.rounds):
        for place, storage in places.items():
            run_id = f"{place.replace(' ', '-')}-{number}"
            sections = {
                "storage": storage,
                "training": {
                    "num_epochs": 1,
                    "global_batch_size": BATCH,
                    "max_train_rows": arguments.steps * BATCH,
                    "log_every_steps": 10,
                },
                "checkpoint": {"keep_last": 2}
                | ({} if place == "no checkpoints" else {"every_steps": arguments.every}),
            }
            recipe = tiny_model.write_recipe(folder / f"{run_id}.yaml", model, "unused", **sections)
            plan = recipe.with_suffix(".json")
            plan.write_text(make_plan(recipe, run_id).model_dump_json())
            command = [sys.executable, str(Path(__file__).resolve()), "--work", str(plan)]
            done = check(run_command(command, {**os.environ, **own, "PYTHON": sys.executable}, folder, timeout=1800))
            line = next(line for line in done.stdout.splitlines() if line.startswith(RESULT))
            one = json.loads(line.removeprefix(RESULT))
            checkpoints = max(len(one["submits"]), 1)
            values = {
                "steps/s": one["steps"] / one["seconds"],
                "stall": 100 * sum(one["submits"]) / one["seconds"],
                "longest": max(one["submits"], default=0.0),
                "CPU": max(one["cpu"] - found["no checkpoints"][number]["process"], 0.0) / checkpoints
                if len(found["no checkpoints"]) > number
                else 0.0,
                "process": one["cpu"],
                "save": sum(one["saves"]) / checkpoints,
                "save share": 100 * sum(one["saves"]) / one["seconds"],
            }
            found[place].append(values)
            print(f"{run_id:<20}", "  ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
    print("\n| to | steps/s | stall, % of time | longest submit, s | save, s each | save, % of time | CPU, s each |")
    print("|:--|--:|--:|--:|--:|--:|--:|")
    for place, runs in found.items():
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(
            f"| {place} | {medians['steps/s']:.3f} | {medians['stall']:.3f} | {medians['longest']:.3f} "
            f"| {medians['save']:.2f} | {medians['save share']:.1f} | {medians['CPU']:.2f} |"
        )


if __name__ == "__main__":
    main()
