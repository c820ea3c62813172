"""The same plan under `torchrun` and through `ray job submit`, interleaved.

python benchmarks/launch.py RECIPE [--runs 3] [--set a.b=value]…

Prints wall seconds to the first step and to the end of training, and CPU seconds. For the Ray side it starts a Ray head
on loopback, outside the timing, and ends it. Each run trains from the start, under a new run id. The Ray side also does
the driver's work (test evaluation, publishing), which its CPU seconds include. Compare its time to the end of training,
which comes from the run's events.
"""

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

from cpu import machine_cpu_seconds
from tercet.cli.main import main as tercet_main
from tercet.config.recipe import load_config
from tercet.planning.survey import survey
from tercet.storage.layout import training_key

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def prepare_environment() -> None:
    """The environment of a head, its jobs and their workers: a token of this process alone, one thread per worker."""
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_worker_niceness="0",
        OMP_NUM_THREADS="1",
        PATH=f"{BIN}:{os.environ['PATH']}",  # a job runs the `python` of the cluster's PATH
    )


def start_head(port: int, dashboard_port: int, folder: str) -> subprocess.Popen[bytes]:
    """`ray start --head` in the foreground, as a child process."""
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port), "--temp-dir", folder]
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{dashboard_port}/api/version",
                headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
            )
            urllib.request.urlopen(request, timeout=2)
        except OSError:
            time.sleep(0.5)
        else:
            return head
    head.send_signal(signal.SIGTERM)
    raise SystemExit("the Ray head did not start")


def measure(recipe: Path, overrides: list[str], mode: str, port: int) -> dict[str, float]:
    """Run from the start; return seconds to the first step, seconds to the end of training, and CPU seconds."""
    config = load_config(recipe, overrides)
    storage, plan = survey(config, f"bench-{mode}-{uuid.uuid4().hex[:8]}")
    started, started_unix, cpu_before = time.monotonic(), time.time(), machine_cpu_seconds()
    if mode == "torchrun":
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(plan.model_dump_json())
            file.flush()
            num_workers = config.workers.num_workers
            command = [
                str(BIN / "torchrun"),
                f"--nproc-per-node={num_workers}",
                "-m",
                "tercet.cli",
                "worker",
                file.name,
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() - started
    else:
        flags = [flag for override in overrides for flag in ("--set", override)]
        address = f"http://127.0.0.1:{port}"
        if tercet_main(["submit", str(recipe), "--run-id", plan.run_id, "--address", address, *flags]):
            raise SystemExit("the job failed")
        events = [json.loads(line) for line in storage.read(f"runs/{plan.run_id}/events.jsonl").splitlines()]
        end = next(event["unix_seconds"] for event in events if event["event"] == "train finished") - started_unix
    log = json.loads(storage.read(training_key(plan.run_id)))
    return {
        "to_first_step_seconds": log["first_step_unix_seconds"] - started_unix,
        "to_end_of_training_seconds": end,
        "training_seconds": log["seconds"]["training"],
        "cpu_seconds": machine_cpu_seconds() - cpu_before,
    }


def main() -> None:
    """Interleave the runs, then print medians and the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    prepare_environment()
    port, dashboard_port = free_port(), free_port()
    results: dict[str, list[dict[str, float]]] = {"torchrun": [], "ray job": []}
    with tempfile.TemporaryDirectory(prefix="rb-") as folder:
        head = start_head(port, dashboard_port, folder)
        try:
            for _ in range(arguments.runs):
                for mode, measured in results.items():
                    kind = mode.split()[0]
                    measured.append(measure(arguments.recipe, arguments.overrides, kind, dashboard_port))
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)
    print(f"\n{'median of ' + str(arguments.runs):<28} {'torchrun':>10} {'ray job':>10} {'ratio':>7}")
    for name in results["torchrun"][0]:
        plain, ray = (statistics.median(run[name] for run in results[mode]) for mode in ("torchrun", "ray job"))
        print(f"{name:<28} {plain:>10.1f} {ray:>10.1f} {ray / plain:>7.2f}")


if __name__ == "__main__":
    main()
