"""How long a checkpoint stays in storage."""

from __future__ import annotations

from tercet.best import best_commit
from tercet.checkpoint import COMMIT, checkpoints_prefix, read_commits, step_prefix
from tercet.crash_point import crash_point
from tercet.storage import Storage


def retain(storage: Storage, run_id: str, metric: str, keep_last: int) -> None:
    """Delete what no one needs any more: every committed checkpoint but the newest `keep_last` and the best, and what
    dead attempts left up to the newest step. COMMIT goes first, so that no checkpoint is ever there in part."""
    commits = read_commits(storage, run_id)
    if not commits:
        return
    kept = {commit.folder for commit in (*commits[:keep_last], best_commit(commits, metric)) if commit is not None}
    for commit in commits:
        if commit.folder not in kept:
            storage.delete(f"{step_prefix(run_id, commit.step)}/{COMMIT}")
            crash_point("mid_retention", commit.step)
    keys = storage.list(checkpoints_prefix(run_id))
    kept_steps = {folder.rpartition("/")[0] for folder in kept}
    # A COMMIT that could not be read is left to a person, with its files; one that does not count is to be replaced.
    left = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{COMMIT}")} - {
        step_prefix(run_id, commit.step) for commit in commits
    }
    depth = checkpoints_prefix(run_id).count("/") + 3
    for folder in {"/".join(key.split("/")[:depth]) for key in keys if not key.endswith(f"/{COMMIT}")} - kept:
        step = folder.rpartition("/")[0]
        if step not in left and int(step.rpartition("/")[2]) <= commits[0].step:
            storage.delete(folder if step in kept_steps else step)
