"""A run over a bad network to S3 gives the same result; a fault that it cannot overcome is reported."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from support import tiny_model
from support.commands import check, run_command
from support.interrupted_run import final_state, proof, settings
from support.s3_server import FaultyProxy, S3Server
from support.workers import make_plan, worker_of
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.failpoints import VARIABLE
from tercet.storage import Storage, open_storage

SHARE = 0.1  # of all requests


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3)
    yield proxy
    proxy.close()


@pytest.fixture
def storage(s3: S3Server, proxy: FaultyProxy, triplets_file: Path) -> Storage:
    """Storage with the dataset. The test itself does not use the proxy."""
    assert proxy.requests == []
    storage = open_storage(f"{s3.new_bucket()}/p")
    build_version([triplets_file], storage, "tiny", IngestOptions(group="group"))
    return storage


def write_recipe(folder: Path, model: Path, storage: Storage, proxy: FaultyProxy) -> Path:
    where = {"uri": storage.uri, "endpoint_url": proxy.endpoint_url}
    return tiny_model.write_recipe(folder / "recipe.yaml", model, "unused", storage=where, **settings())


def command_of(recipe: Path, run_id: str) -> list[str]:
    plan = recipe.with_suffix(".json")
    plan.write_text(make_plan(recipe, run_id).model_dump_json(), encoding="utf-8")
    return worker_of(plan)


def environment_of(server: S3Server, environment: dict[str, str], cache: Path) -> dict[str, str]:
    """Return an environment with credentials and an empty cache, so that shards come through the proxy too."""
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    return {**environment, **keys, "AWS_EC2_METADATA_DISABLED": "true", "TERCET_CACHE_DIR": str(cache)}


def on_this_disk(storage: Storage, run_id: str, folder: Path) -> Path:
    """Download a run, each object verified by its hash."""
    for key in storage.list(f"runs/{run_id}"):
        storage.download(key, folder / key)
    return folder


def test_a_kill_and_a_bad_network_do_not_change_the_result(
    whole: dict[int, str],
    s3: S3Server,
    storage: Storage,
    proxy: FaultyProxy,
    model: Path,
    store: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """One request in ten is refused, or gets a flipped bit, half a reply, or none."""
    # A list has no hash, so a flipped bit in it cannot be detected.
    reads, lists, writes = cycle(["cut", "flip"]), cycle(["cut", "refuse"]), cycle(["refuse", "lose_reply"])
    faults = {"read": reads, "list": lists, "write": writes}
    num_requests, done, one_at_a_time = Counter[str](), list[str](), threading.Lock()

    def decide(method: str, path: str) -> str | None:
        kind = "write" if method != "GET" else "list" if "list-type" in path else "read"
        with one_at_a_time:
            num_requests[kind] += 1
            if num_requests[kind] % round(1 / SHARE):
                return None
            done.append(next(faults[kind]))
            return done[-1]

    recipe = write_recipe(tmp_path, model, storage, proxy)
    command = command_of(recipe, "bad-network")
    there = environment_of(s3, environment, tmp_path / "cache")
    proxy.decide = decide
    armed = {VARIABLE: f"at=before_commit step=12 once={tmp_path / 'fired'}"}
    died = run_command(command, {**there, **armed}, tmp_path)
    assert (tmp_path / "fired").exists(), died.stdout[-3000:]
    check(run_command(command, there, tmp_path))
    proxy.decide = lambda method, path: None  # noqa: ARG005
    assert len(done) > 20
    assert {"refuse", "lose_reply", "flip", "cut"} == set(done)
    copy = on_this_disk(storage, "bad-network", tmp_path / "copy")
    assert final_state(copy, "bad-network") == final_state(store, whole[1])
    (copy / "datasets").symlink_to(store / "datasets")
    local = tiny_model.write_recipe(tmp_path / "local.yaml", model, copy, **settings())
    assert len(proof(copy, local, "bad-network").attempts) == 2


def test_credentials_expire_during_a_run(
    whole: dict[int, str],
    s3: S3Server,
    storage: Storage,
    proxy: FaultyProxy,
    model: Path,
    store: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """The run ends at once and reports why. It resumes with new credentials."""
    command = command_of(write_recipe(tmp_path, model, storage, proxy), "expired")
    there = environment_of(s3, environment, tmp_path / "cache")
    expired = []

    def decide(_: str, path: str) -> str | None:
        if "checkpoints/00000016" in path or expired:
            expired.append(path)
            return "expired"
        return None

    proxy.decide = decide
    died = run_command(command, there, tmp_path)
    assert died.returncode != 0
    assert "denied access to" in died.stdout
    assert "(ExpiredToken)" in died.stdout
    proxy.decide = lambda method, path: None  # noqa: ARG005
    done = check(run_command(command, there, tmp_path))
    assert "resuming from the checkpoint of step 12" in done.stdout
    assert final_state(on_this_disk(storage, "expired", tmp_path / "copy"), "expired") == final_state(store, whole[1])
