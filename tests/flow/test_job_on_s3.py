"""Jobs on a separate Ray cluster with a real S3 server: submitted, finished, failed, stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import tiny_model
from support.commands import REPOSITORY, check, run_command, tercet
from support.s3_server import S3Server, free_port, use
from tercet.artifacts.checkpoint import read_commits
from tercet.storage import Storage, open_storage

pytestmark = pytest.mark.soak


@dataclass(frozen=True)
class Cluster:
    """A Ray head on loopback, and what a laptop needs to reach it."""

    address: str
    environment: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def laptop(rgw_s3: S3Server, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A user's shell: S3 credentials, no token for Ray. This process gets the credentials too."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(rgw_s3, monkeypatch)
        settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        yield {**environment, **settings, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def cluster(laptop: dict[str, str], environment: dict[str, str]) -> Iterator[Cluster]:
    """`ray start --head --block` without S3 credentials, which must come with the job. Ended by its pid."""
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))  # short: a socket's path has at most 107 characters
    ports = {name: str(free_port()) for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    places = [part for name, port in ports.items() for part in (f"--{name}", port)]
    loopback = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true"]
    limits = [
        "--num-cpus",
        "3",
        "--object-store-memory",
        "100000000",
        "--temp-dir",
        str(folder),
        "--disable-usage-stats",
    ]
    command = [environment["PYTHON"], "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    head = {**environment, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *places, *loopback, *limits], env=head, stdout=out, stderr=out, start_new_session=True
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        _wait_for(f"{address}/api/version", process, log)
        yield Cluster(address, laptop, log)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes], patience_seconds: float = 8) -> None:
    """Ask the head to end, then kill what is left: the head drains its node first, which takes too long for a test."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=patience_seconds)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@dataclass(frozen=True)
class Bucket:
    """A dataset in S3, made by `tercet shard`."""

    uri: str
    storage: Storage
    tmp: Path

    def recipe(self, name: str, model: Path, **sections: Any) -> Path:
        return tiny_model.write_recipe(self.tmp / f"{name}.yaml", model, self.uri, **sections)

    def document(self, key: str) -> Any:
        return json.loads(self.storage.read(key))


@pytest.fixture(scope="module")
def bucket(
    rgw_s3: S3Server, laptop: dict[str, str], triplets_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bucket:
    uri = f"{rgw_s3.new_bucket()}/team"
    tmp = tmp_path_factory.mktemp("s3")
    command = tercet("shard", triplets_file, "--to", uri, "--name", "tiny", "--group", "group")
    check(run_command(command, laptop, tmp))
    return Bucket(uri, open_storage(uri), tmp)


def _submit(cluster: Cluster, recipe: Path, run_id: str) -> list[str]:
    return tercet("submit", recipe, "--run-id", run_id, "--address", cluster.address)


@pytest.fixture(scope="module")
def finished(cluster: Cluster, bucket: Bucket, tiny_model_dir: Path) -> Path:
    """The recipe of a successful run on two workers."""
    recipe = bucket.recipe("well", tiny_model_dir, workers={"num_workers": 2})
    done = check(run_command(_submit(cluster, recipe, "well"), cluster.environment, bucket.tmp))
    assert "On the test split the best model is better than the baseline" in done.stdout
    return recipe


@pytest.mark.usefixtures("finished")
def test_the_result_is_in_s3(bucket: Bucket) -> None:
    metrics = bucket.document("runs/well/metrics.json")
    assert metrics["best_test"]["ndcg@10"] > metrics["baseline_test"]["ndcg@10"] + 0.2
    report = bucket.document("runs/well/report.json")
    assert (report["status"], report["best_uri"]) == ("finished", f"{bucket.uri}/runs/well/best")
    best = bucket.document("runs/well/best/COMMIT")
    keys = {key.removeprefix("runs/well/best/") for key in bucket.storage.list("runs/well/best")}
    assert keys == {"COMMIT", *best["files"]}


def test_a_second_submission_returns_the_result_at_once(cluster: Cluster, bucket: Bucket, finished: Path) -> None:
    before = bucket.storage.read("runs/well/events.jsonl")
    done = check(run_command(_submit(cluster, finished, "well"), cluster.environment, bucket.tmp))
    assert "well has already finished; this is its result" in done.stdout
    assert bucket.storage.read("runs/well/events.jsonl") == before


def test_a_failed_job_has_an_exit_code_of_its_own(cluster: Cluster, bucket: Bucket, tiny_model_dir: Path) -> None:
    recipe = bucket.recipe("frozen", tiny_model_dir, training={"learning_rate": 1e-60})
    done = check(run_command(_submit(cluster, recipe, "frozen"), cluster.environment, bucket.tmp), code=7)
    assert "no weight moved" in done.stdout
    assert "job frozen ended as FAILED" in done.stdout
    assert bucket.document("runs/frozen/report.json")["status"] == "failed"


def test_a_stopped_job_is_no_success(cluster: Cluster, bucket: Bucket, tiny_model_dir: Path) -> None:
    """`ray job submit` would exit with 0 here."""
    recipe = bucket.recipe("stopped", tiny_model_dir, training={"num_epochs": 400, "log_every_steps": 50})
    command = _submit(cluster, recipe, "stopped")
    process = subprocess.Popen(
        command, env=cluster.environment, cwd=bucket.tmp, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 400
        while not read_commits(bucket.storage, "stopped"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--address", cluster.address, "stopped"]
        check(run_command(stop, cluster.environment, bucket.tmp))
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert process.returncode == 7, output
    assert "job stopped ended as STOPPED" in output
    assert not bucket.storage.exists("runs/stopped/metrics.json")


def test_plain_ray_job_submit_runs_the_same(
    cluster: Cluster, bucket: Bucket, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The repository is the working directory, and credentials are passed by hand, as documented."""
    shutil.copytree(REPOSITORY / "ray_jobs", tmp_path / "repo/ray_jobs")
    bucket.recipe("plain", tiny_model_dir, training={"num_epochs": 1}).rename(tmp_path / "repo/my.yaml")
    passed = {name: value for name, value in cluster.environment.items() if name.startswith("AWS_")}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.address]
    runtime = ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": passed})]
    command = [*ray, *runtime, "--", "python", "ray_jobs/train.py", "my.yaml", "--run-id", "plain"]
    done = check(run_command(command, cluster.environment, tmp_path / "repo"))
    assert "On the test split" in done.stdout
    assert bucket.document("runs/plain/report.json")["status"] == "finished"
