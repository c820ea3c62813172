"""The Kubernetes manifests are well formed and agree with each other. They are not run on a cluster here."""

from __future__ import annotations

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


def test_the_head_trains_nothing_and_each_worker_has_a_gpu(job: dict[str, Any]) -> None:
    head, worker = pods(job)
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert worker["terminationGracePeriodSeconds"] >= 60


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
