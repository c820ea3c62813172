"""A submitted job is followed to its end, and the exit code reports how it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus

from support import builders
from tercet.cluster import jobs
from tercet.cluster.jobs import submit
from tercet.config.recipe import Config
from tercet.errors import JobError

PENDING, RUNNING = JobStatus.PENDING, JobStatus.RUNNING
SUCCEEDED, FAILED, STOPPED = JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED
ADDRESS = "http://127.0.0.1:8265"
PLACE = {"uri": "s3://bucket/prefix"}
PLAN, CONFIG = builders.plan(storage=PLACE), builders.config(storage=PLACE)


class Cluster:
    """Stands in for Ray's JobSubmissionClient: one job that was in the state `before`, and then passes through
    `states`, each (status, log so far). A state that is an exception is raised instead."""

    def __init__(self, *states: tuple[JobStatus, str] | Exception, before: JobStatus | None = None) -> None:
        self.states, self.before = list(states), before
        self.calls: list[tuple[str, Any]] = []
        self.recipe: dict[str, Any] = {}
        self.refuses: Exception | None = None

    def submit_job(self, **arguments: Any) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.calls.append(("submit", arguments))
        self.recipe = yaml.safe_load(Path(arguments["runtime_env"]["working_dir"], "recipe.yaml").read_text())

    def delete_job(self, job_id: str) -> None:
        self.calls.append(("delete", job_id))

    def get_job_status(self, job_id: str) -> JobStatus:
        if ("status", job_id) not in self.calls:
            self.calls.append(("status", job_id))
            if self.before is None:
                raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
            return self.before
        state = self.states[0]
        if isinstance(state, Exception):
            if len(self.states) > 1:
                self.states.pop(0)
            raise state
        return state[0]

    def get_job_logs(self, _: str) -> str:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        assert not isinstance(state, Exception)
        return state[1]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls if name != "status"]


Play = Callable[..., list[str]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Submit to a cluster and return the lines shown."""
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(jobs, "UNREACHABLE_SECONDS", 60.0)

    def start(cluster: Cluster, follow: bool = True, said: list[str] | None = None) -> list[str]:
        monkeypatch.setattr(jobs, "_client", lambda _: cluster)
        said = [] if said is None else said
        assert submit(PLAN, CONFIG, ADDRESS, said.append, follow=follow) == PLAN.run_id
        return said

    return start


def test_a_job_that_succeeds_shows_its_log_once(play: Play) -> None:
    cluster = Cluster((PENDING, ""), (RUNNING, "one\ntw"), (RUNNING, "one\ntwo\n"), (SUCCEEDED, "one\ntwo\nthree"))
    said = play(cluster)
    assert said == [f"submitted {PLAN.run_id} to {ADDRESS}", "one", "two", "three"]
    assert cluster.names == ["submit"]


def test_what_is_submitted(play: Play) -> None:
    cluster = Cluster((SUCCEEDED, ""))
    play(cluster)
    ((_, arguments),) = [call for call in cluster.calls if call[0] == "submit"]
    run_id = PLAN.run_id
    assert arguments["submission_id"] == run_id
    assert arguments["entrypoint"] == f"python -m tercet.cli train recipe.yaml --run-id {run_id}"
    assert Config.model_validate(cluster.recipe) == CONFIG
    assert arguments["runtime_env"]["env_vars"]["PYTHONUNBUFFERED"] == "1"
    assert not Path(arguments["runtime_env"]["working_dir"]).exists()  # nothing is left behind


@pytest.mark.parametrize("end", [FAILED, STOPPED])
def test_a_job_that_does_not_succeed(play: Play, end: JobStatus) -> None:
    said: list[str] = []
    with pytest.raises(JobError, match=f"ended as {end.value}") as caught:
        play(Cluster((RUNNING, "a\n"), (end, "a\nTraceback\n")), said=said)
    assert caught.value.exit_code == 7
    assert said[1:] == ["a", "Traceback"]
    assert "submit again to resume" in caught.value.hint


@pytest.mark.parametrize("status", [PENDING, RUNNING])
def test_a_job_that_runs_already_is_followed(play: Play, status: JobStatus) -> None:
    cluster = Cluster((RUNNING, "one\n"), (SUCCEEDED, "one\ntwo\n"), before=status)
    assert play(cluster)[1:] == ["one", "two"]
    assert cluster.names == []


@pytest.mark.parametrize("status", [FAILED, STOPPED, SUCCEEDED])
def test_a_job_that_ended_before_is_started_again_under_its_id(play: Play, status: JobStatus) -> None:
    cluster = Cluster((SUCCEEDED, ""), before=status)
    assert play(cluster)[0].startswith(f"{PLAN.run_id} {status.value.lower()} before; starting it again")
    assert cluster.names == ["delete", "submit"]


def test_without_following_it_returns_at_once(play: Play) -> None:
    cluster = Cluster((FAILED, "never asked"))
    assert play(cluster, follow=False) == [f"submitted {PLAN.run_id} to {ADDRESS}"]


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("500\nlong"), OSError("reset")], ids=repr)
def test_a_head_that_does_not_answer_for_a_moment(play: Play, error: Exception) -> None:
    assert play(Cluster((RUNNING, "one\n"), error, error, (SUCCEEDED, "one\ntwo\n")))[1:] == ["one", "two"]


def test_a_head_that_never_answers_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "UNREACHABLE_SECONDS", 0.05)
    with pytest.raises(JobError, match=r"the cluster stopped answering: refused$") as caught:
        play(Cluster((RUNNING, ""), ConnectionError("refused")))
    assert "resumes from its last checkpoint" in caught.value.hint


def test_a_cluster_that_refuses_the_job(play: Play) -> None:
    cluster = Cluster((RUNNING, ""))
    cluster.refuses = RuntimeError("Job with submission_id r already exists\nTraceback ...")
    with pytest.raises(JobError, match=r"did not take job .*: Job with submission_id r already exists$"):
        play(cluster)


@pytest.mark.parametrize("error", [RuntimeError("500: broken"), ConnectionError("gone")], ids=repr)
def test_a_status_that_cannot_be_read(play: Play, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: str) -> JobStatus:
        raise error

    cluster = Cluster((RUNNING, ""))
    monkeypatch.setattr(cluster, "get_job_status", fail)
    with pytest.raises(JobError, match="cannot read the status"):
        play(cluster)
    assert cluster.names == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "127.0.0.1"])
def test_no_cluster_at_the_address(address: str) -> None:
    with pytest.raises(JobError, match=f"no Ray cluster answers at {address}") as caught:
        submit(PLAN, CONFIG, address, print)
    assert "8265" in caught.value.hint


def test_a_local_folder_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_client", lambda _: Cluster((SUCCEEDED, "")))
    said: list[str] = []
    submit(builders.plan(), builders.config(), ADDRESS, said.append)
    assert said[0].startswith("note: storage is the folder ./tercet-store")


def test_the_workers_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://h")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    environment = jobs.job_environment(builders.config())
    assert environment["AWS_ENDPOINT_URL"] == "https://h"
    assert "SOMETHING_ELSE" not in environment
