"""The best checkpoint of a run, and its model where others load it.

It is a copy, so the checkpoint can be deleted and the model kept.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, damage_of, fetch, read_commit, read_commits, upload_files
from tercet.errors import CorruptObject, ObjectNotFound
from tercet.failpoints import crash_point
from tercet.storage import Storage
from tercet.storage.documents import seal
from tercet.storage.layout import (
    attempt_folder_of,
    best_commit_key,
    best_prefix,
    checkpoints_prefix,
    commit_key,
    is_commit,
    step_of,
    step_prefix,
)

logger = logging.getLogger("tercet")


def best_commit(commits: Iterable[Commit], metric: str) -> Commit | None:
    """Return the commit with the highest metric, the earliest of equals; None if none has the metric."""
    return max((c for c in commits if metric in c.metrics), key=lambda c: (c.metrics[metric], -c.step), default=None)


def best_whole(storage: Storage, commits: Iterable[Commit], metric: str) -> Commit | None:
    """Return the best commit whose model is whole, or None. A damaged one is skipped with an error in the log.

    Reads the model's files."""
    left = list(commits)
    while (best := best_commit(left, metric)) is not None:
        if (damage := damage_of(storage, best, best.model_files())) is None:
            return best
        logger.error("the best checkpoint, of step %d, is damaged; the next best is used: %s", best.step, damage)
        left.remove(best)
    return None


def publish_best(storage: Storage, run_id: str, commit: Commit, card: str) -> Commit:
    """Copy the model of a committed checkpoint to `best/`, verifying every file, with `card` as its README.md.

    Returns the commit of `best/`. Does nothing if `best/` is of this checkpoint already."""
    folder = best_prefix(run_id)
    if (done := read_best(storage, run_id)) is not None and (done.step, done.attempt) == (commit.step, commit.attempt):
        return done
    storage.delete(folder)
    with tempfile.TemporaryDirectory(prefix="tercet-best-") as local:
        fetch(storage, commit, Path(local), commit.model_files())
        (Path(local) / "README.md").write_text(card, encoding="utf-8")
        best = commit.model_copy(update={"folder": folder, "files": upload_files(storage, Path(local), folder)})
    crash_point("before_publish")
    storage.put(best_commit_key(run_id), seal(best))
    return best


def read_best(storage: Storage, run_id: str) -> Commit | None:
    """Return the commit of `best/`, or None if it is missing or damaged: publishing again replaces it."""
    try:
        return read_commit(storage, best_commit_key(run_id))
    except (ObjectNotFound, CorruptObject):
        return None


def retain(storage: Storage, run_id: str, metric: str, keep_last: int) -> None:
    """Delete every committed checkpoint but the newest `keep_last` and the best, and what dead attempts left up to the
    newest step. COMMIT is deleted first, so that no partial checkpoint ever counts."""
    commits = read_commits(storage, run_id)
    if not commits:
        return
    kept = [commit for commit in (*commits[:keep_last], best_commit(commits, metric)) if commit is not None]
    for commit in commits:
        if commit not in kept:
            storage.delete(commit_key(run_id, commit.step))
            crash_point("mid_retention", commit.step)
    keys = storage.list(checkpoints_prefix(run_id))
    # An unreadable COMMIT is left, with its files, for a user to look at; one that does not count will be replaced.
    unreadable = {step_of(key) for key in keys if is_commit(key)} - {commit.step for commit in commits}
    kept_folders, kept_steps = {commit.folder for commit in kept}, {commit.step for commit in kept}
    doomed: set[str] = set()
    for key in keys:
        step = step_of(key)
        if step is None or step > commits[0].step or step in unreadable or is_commit(key):
            continue
        folder = attempt_folder_of(key)
        if folder not in kept_folders:
            doomed.add(folder if step in kept_steps else step_prefix(run_id, step))
    for folder in doomed:
        storage.delete(folder)
