"""The Kubernetes manifests are well formed and agree with each other. They are not run on a cluster here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import REPOSITORY
from tercet import __version__
from tercet.cli.main import _parser

FOLDER = REPOSITORY / "ray_jobs" / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    [rayjob] = documents("rayjob.yaml")
    return rayjob


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_job_starts_the_night(job: dict[str, Any]) -> None:
    program, *arguments = job["spec"]["entrypoint"].split()
    assert program == "tercet"
    assert _parser().parse_args(arguments).call.__name__ == "_nightly"


def test_every_machine_has_the_image_of_this_version_and_the_recipe(job: dict[str, Any]) -> None:
    for pod in pods(job):
        [container] = pod["containers"]
        assert container["image"].endswith(f"/tercet:{__version__}")
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["recipe"] == str(Path(job["spec"]["entrypoint"].split()[-1]).parent)
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_head_trains_nothing_and_a_worker_pod_has_a_whole_machine(job: dict[str, Any]) -> None:
    head, worker = pods(job)
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    resources = worker["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"
    assert worker["terminationGracePeriodSeconds"] >= 60
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == resources["requests"]["cpu"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def num_bytes(size: str) -> int:
    return int(size.removesuffix("Gi")) * 2**30


def test_shared_memory_has_room_for_the_object_store_and_nccl(job: dict[str, Any]) -> None:
    """Ray would put an object store that does not fit into /tmp, and NCCL would fail."""
    cluster = job["spec"]["rayClusterSpec"]
    for group, pod in zip((cluster["headGroupSpec"], *cluster["workerGroupSpecs"]), pods(job), strict=True):
        mounted = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == mounted["/dev/shm"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        limit = num_bytes(volume["emptyDir"]["sizeLimit"])
        assert limit > 1.5 * int(group["rayStartParams"]["object-store-memory"])
        assert limit <= num_bytes(pod["containers"][0]["resources"]["limits"]["memory"]) / 4


def test_checkpoints_are_not_written_to_the_containers_layer(job: dict[str, Any]) -> None:
    container = pods(job)[1]["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert variables["TMPDIR"] in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {variable["name"] for variable in pods(job)[0]["containers"][0]["env"]} < variables.keys()


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_efa_as_in_the_comments(name: str) -> None:
    text = re.sub(
        r"# (vpc\.amazonaws|hugepages|- \{name: FI_|securityContext)", r"\1", (FOLDER / name).read_text("utf-8")
    )
    [document] = yaml.safe_load_all(text)
    spec = document["spec"].get("jobTemplate", document["spec"])
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    for kind in ("requests", "limits"):  # extended resources cannot be overcommitted
        assert container["resources"][kind]["vpc.amazonaws.com/efa"] == "32"
        assert container["resources"][kind]["hugepages-2Mi"] == "5120Mi"
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}


def test_the_scheduled_ones_start_the_same_job(job: dict[str, Any]) -> None:
    [ray_cron_job] = documents("raycronjob.yaml")
    assert ray_cron_job["spec"]["jobTemplate"] == job["spec"]
    cron_job, account, role, binding = documents("cronjob.yaml")
    assert cron_job["spec"]["schedule"] == ray_cron_job["spec"]["schedule"]
    pod = cron_job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1].endswith("/rayjob.yaml")
    names = {pod["serviceAccountName"], account["metadata"]["name"], binding["subjects"][0]["name"]}
    assert names == {"tercet-nightly"}
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
