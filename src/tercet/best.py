"""The best checkpoint of a run, and its model where others load it.

    runs/<run_id>/best/…        its servable files: SentenceTransformer(".../best") loads them
    runs/<run_id>/best/COMMIT   written last: now it exists

A copy, so that the checkpoint may be deleted and the model not.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tercet.checkpoint import COMMIT, Commit, damage_of, fetch, read_commit, upload_files
from tercet.crash_point import crash_point
from tercet.errors import CorruptObject, ObjectNotFound
from tercet.sealed import seal
from tercet.storage import Storage

logger = logging.getLogger(__name__)


def best_commit(commits: Iterable[Commit], metric: str) -> Commit | None:
    """The commit with the highest metric; the earlier one of equals."""
    return max((c for c in commits if metric in c.metrics), key=lambda c: (c.metrics[metric], -c.step), default=None)


def best_whole(storage: Storage, commits: Iterable[Commit], metric: str) -> Commit | None:
    """The best commit whose model is whole; a damaged one is skipped, loudly, for the next best. Reads the model."""
    left = list(commits)
    while (best := best_commit(left, metric)) is not None:
        if (damage := damage_of(storage, best, best.model_files())) is None:
            return best
        logger.error("the best checkpoint, of step %d, is damaged; the next best is taken: %s", best.step, damage)
        left.remove(best)
    return None


def best_prefix(run_id: str) -> str:
    """Where a run's servable model lies: a folder that `SentenceTransformer(path)` loads."""
    return f"runs/{run_id}/best"


def publish_best(storage: Storage, run_id: str, commit: Commit, card: str) -> Commit:
    """Copy the model of a committed checkpoint to `best/`, verified on the way, with `card` as its README.md.

    Returns the commit of `best/`. Already there: nothing is done."""
    folder = best_prefix(run_id)
    if (done := read_best(storage, run_id)) is not None and (done.step, done.attempt) == (commit.step, commit.attempt):
        return done
    storage.delete(folder)
    with tempfile.TemporaryDirectory(prefix="tercet-best-") as local:
        fetch(storage, commit, Path(local), commit.model_files())
        (Path(local) / "README.md").write_text(card, encoding="utf-8")
        best = commit.model_copy(update={"folder": folder, "files": upload_files(storage, Path(local), folder)})
    crash_point("before_publish")
    storage.put(f"{folder}/{COMMIT}", seal(best))
    return best


def read_best(storage: Storage, run_id: str) -> Commit | None:
    """The commit of `best/`, or None while there is none. A damaged one is none: publishing again replaces it."""
    try:
        return read_commit(storage, f"{best_prefix(run_id)}/{COMMIT}")
    except (ObjectNotFound, CorruptObject):
        return None
