"""Submit runs to a remote cluster, through Ray Jobs.

The submission id is the run id, so a second submission of a run finds the job of the first and follows it.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.cluster.session import environment
from tercet.config.recipe import Config, as_yaml
from tercet.errors import JobError, first_line
from tercet.planning.plan import TrainPlan

POLL_SECONDS = 1.0
UNREACHABLE_SECONDS = 120.0  # a head that restarts is back within a minute or two


def submit(plan: TrainPlan, config: Config, address: str, say: Callable[[str], None], follow: bool = True) -> str:
    """Start `tercet train` on the cluster at `address` (such as http://127.0.0.1:8265), unless it runs there already.

    say: shows a line to the user. follow: wait for the end of the job, and show its log.
    Returns the submission id. tercet must be installed on the cluster (docker/Dockerfile): only the recipe is sent.
    Raises JobError if the cluster does not answer, or if the job does not succeed."""
    from ray.job_submission import JobStatus

    if "://" not in config.storage.uri:
        say(f"note: storage is the folder {config.storage.uri}, which every machine of the cluster must see")
    client = _client(address)
    job_id = plan.run_id
    status = _status(client, job_id)
    if status in (JobStatus.PENDING, JobStatus.RUNNING):
        say(f"{job_id} is {status.lower()} already")
    else:
        if status is not None:
            say(f"{job_id} {status.lower()} before; starting it again, it resumes from its last checkpoint")
            client.delete_job(job_id)
        with tempfile.TemporaryDirectory(prefix="tercet-submit-") as folder:
            (Path(folder) / "recipe.yaml").write_text(as_yaml(config), encoding="utf-8")
            try:
                client.submit_job(
                    submission_id=job_id,
                    entrypoint=shlex.join(["python", "-m", "tercet.cli", "train", "recipe.yaml", "--run-id", job_id]),
                    runtime_env={"working_dir": folder, "env_vars": job_environment(config)},
                    metadata={"run_id": job_id, "name": config.name},
                )
            except (RuntimeError, OSError) as error:
                raise JobError(
                    f"the cluster did not take job {job_id}: {first_line(error)}",
                    hint="submit again: if the job was started elsewhere at the same moment, it will be followed",
                ) from None
        say(f"submitted {job_id} to {address}")
    if follow:
        _follow(client, job_id, say)
    return job_id


def job_environment(config: Config) -> dict[str, str]:
    """Return the environment variables of the driver on the cluster: credentials, endpoint, offline flags."""
    return {**environment(config.workers), "RAY_JOB_STOP_WAIT_TIME_S": "30", "PYTHONUNBUFFERED": "1"}


def _client(address: str) -> Any:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (RuntimeError, OSError, ValueError, RayError) as error:
        raise JobError(
            f"no Ray cluster answers at {address}: {first_line(error)}",
            hint="is the head up (`ray status`), and is the dashboard's port (8265) forwarded "
            "(`ray dashboard cluster.yaml`)?",
        ) from None


def _status(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_status(job_id)
    except (RuntimeError, OSError) as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise JobError(
            f"cannot read the status of job {job_id}: {first_line(error)}",
            hint="is the head up (`ray status`)? Submit again to follow the job",
        ) from None


def _follow(client: Any, job_id: str, say: Callable[[str], None]) -> None:
    """Show the job's log as it grows, until the job ends.

    Polls, because Ray's log stream ends silently when the connection is lost, and `ray job submit` exits 0 for a job
    that was stopped."""
    from ray.job_submission import JobStatus

    num_shown, answered_at = 0, time.monotonic()
    while True:
        try:
            status, log = client.get_job_status(job_id), client.get_job_logs(job_id)
            answered_at = time.monotonic()
        except (RuntimeError, OSError) as error:
            if time.monotonic() - answered_at > UNREACHABLE_SECONDS:
                raise JobError(
                    f"the cluster stopped answering: {first_line(error)}",
                    hint=f"submit again when it is back: {job_id} resumes from its last checkpoint",
                ) from None
            time.sleep(POLL_SECONDS)
            continue
        whole = log.rfind("\n") + 1 if not status.is_terminal() else len(log)
        if whole > num_shown:
            say(log[num_shown:whole].rstrip("\n"))
            num_shown = whole
        if status == JobStatus.SUCCEEDED:
            return
        if status.is_terminal():
            raise JobError(
                f"job {job_id} ended as {status}",
                hint="its log is above; submit again to resume from the last checkpoint",
            )
        time.sleep(POLL_SECONDS)
