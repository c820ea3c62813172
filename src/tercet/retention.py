"""How long a checkpoint stays in storage."""

from __future__ import annotations

from tercet.best import best_commit
from tercet.checkpoint import COMMIT, checkpoints_prefix, read_commits, step_of, step_prefix
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
    old = [key for key in keys if (step := step_of(key)) is not None and step <= commits[0].step]
    for folder in {"/".join(key.split("/")[:depth]) for key in old if not key.endswith(f"/{COMMIT}")} - kept:
        of_step = folder.rpartition("/")[0]
        if of_step not in left:
            storage.delete(folder if of_step in kept_steps else of_step)
