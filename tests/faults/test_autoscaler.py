"""`use_gpu: auto` on clusters without GPUs: one that can start machines with them, one that cannot, one that nothing
scales. The autoscaler is Ray's own; its machines are played by Ray's provider for tests. Needs root and `ip netns`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from support.machines import CannotIsolate, Machine, network
from support.ray_cluster import PATIENCE_SECONDS, RAY

pytestmark = pytest.mark.soak

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # the provider's
COMMANDS = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization")
SCALED = {
    "cluster_name": "t",
    "max_workers": 4,
    "provider": {
        "type": "external",
        "module": f"{PROVIDER}.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 4, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    **{f"{name}_commands": [] for name in COMMANDS},
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "no_restart": False,
}
FAKE = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}

# Prints, for each workers section, how it is decided, or the error; and the seconds that this took.
DECIDE = """
import json, sys, time
from tercet.cluster import session
from tercet.cluster.devices import choose_devices
from tercet.config.sections import WorkersConfig
from tercet.errors import PlanError

session.start_ray(WorkersConfig())
for section in json.loads(sys.argv[1]):
    started = time.monotonic()
    try:
        chosen = choose_devices(WorkersConfig(**section), session.cluster_address())
        answer = [chosen.use_gpu, chosen.reason]
    except PlanError as error:
        answer = [None, error.message]
    print("RESULT" + json.dumps([*answer, time.monotonic() - started]), flush=True)
"""

Decide = Callable[..., list[tuple[bool | None, str, float]]]


@pytest.fixture
def decide_on(environment: dict[str, str], tmp_path: Path) -> Iterator[Decide]:
    """A function that starts a cluster with an autoscaler's configuration, or none, and decides `use_gpu` on it."""
    folder = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))  # a short path: names of sockets have a limit

    def decide(
        config: Mapping[str, object] | None, *sections: Mapping[str, object]
    ) -> list[tuple[bool | None, str, float]]:
        settings = {**environment, **(FAKE if config else {}), "RAY_AUTH_MODE": "disabled"}
        log, answers = tmp_path / "head.log", tmp_path / "answers.log"
        arguments = [
            "--head",
            "--port",
            "6379",
            "--num-cpus",
            "0",
            "--num-gpus",
            "0",
            "--object-store-memory",
            "80000000",
        ]
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
            arguments += ["--autoscaling-config", str(tmp_path / "config.json")]
        place = ["--node-ip-address", head.address, "--temp-dir", str(folder)]
        started = head.start([*RAY, "start", "--disable-usage-stats", *arguments, *place], settings, log)
        assert started.wait(timeout=240) == 0, log.read_text()
        command = [sys.executable, "-c", DECIDE, json.dumps(sections)]
        driver = head.start(command, {**settings, "RAY_ADDRESS": f"{head.address}:6379"}, answers)
        assert driver.wait(timeout=PATIENCE_SECONDS) == 0, answers.read_text()
        lines = [line for line in answers.read_text().splitlines() if line.startswith("RESULT")]
        return [tuple(json.loads(line.removeprefix("RESULT"))) for line in lines]

    try:
        with network() as machines:
            head: Machine = machines.add()
            yield decide
    except CannotIsolate as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_scales_from_zero(decide_on: Decide) -> None:
    """It may have two machines with two GPUs each."""
    sections = [{"num_workers": 4}, {"min": 4, "max": 9}, {"num_workers": 5}, {"num_workers": 5, "use_gpu": True}]
    has = "the Ray cluster has no GPUs"
    grows, as_many, too_many, wanted = decide_on(SCALED, *sections)
    assert grows[:2] == as_many[:2] == (True, f"{has}, and 4 workers need one each; it can start the missing machines")
    # By then, machines may have joined.
    assert [answer[0] for answer in (too_many, wanted)] == [False, None]
    assert all(answer[1].endswith("and 5 workers need one each") for answer in (too_many, wanted))
    assert grows[2] < 25
    assert as_many[2] < 1  # the same question
    assert wanted[2] < 1


def test_a_cluster_that_nothing_scales(decide_on: Decide) -> None:
    auto, wanted = decide_on(None, {"num_workers": 1}, {"num_workers": 1, "use_gpu": True})
    assert auto[:2] == (False, "the Ray cluster has no GPUs")
    assert wanted[:2] == (None, "workers.use_gpu is true, but the Ray cluster has no GPUs")
