"""Every key of a run, a dataset and a model, in one place."""

from __future__ import annotations


def evaluation_key(run_id: str, step: int) -> str:
    """Where the metrics of one evaluation on the eval split lie."""
    return f"runs/{run_id}/evaluations/{step:08d}.json"


def training_key(run_id: str) -> str:
    """Where the log of a finished training lies."""
    return f"runs/{run_id}/training.json"


def plan_key(run_id: str) -> str:
    """Where the plan of a run lies."""
    return f"runs/{run_id}/plan.json"


def lease_key(run_id: str) -> str:
    """Where a run's lease lies."""
    return f"runs/{run_id}/LEASE.json"


COMMIT = "COMMIT"


def checkpoints_prefix(run_id: str) -> str:
    """Where a run's checkpoints lie."""
    return f"runs/{run_id}/checkpoints"


def step_prefix(run_id: str, step: int) -> str:
    """Where one step's checkpoint lies, of whatever attempt."""
    return f"{checkpoints_prefix(run_id)}/{step:08d}"


def step_of(key: str) -> int | None:
    """The step of the checkpoint that a key belongs to; None for what a person or a file manager left beside them."""
    _, _, _, step, *below = key.split("/")
    return int(step) if below and step.isdecimal() else None


def attempt_folder(run_id: str, step: int, attempt: str) -> str:
    """The key of the folder into which one attempt writes one step's files."""
    return f"{step_prefix(run_id, step)}/{attempt}"


def best_prefix(run_id: str) -> str:
    """Where a run's servable model lies: a folder that `SentenceTransformer(path)` loads."""
    return f"runs/{run_id}/best"
