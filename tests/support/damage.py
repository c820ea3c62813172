"""Damage one object of a finished run, load everything as the product does, and compare with the undamaged state.

A load may refuse (a TercetError), fall back to an older whole checkpoint and say so, or give what it gave before. It
may never give anything else without a word.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.workers import make_plan
from tercet.artifacts.best import best_whole, publish_best, read_best
from tercet.artifacts.checkpoint import Commit, commit_step, fetch, fetch_newest, read_commits, upload_part
from tercet.artifacts.journal import Events
from tercet.artifacts.lease import Lease
from tercet.config.recipe import load_config
from tercet.data.build import build_version
from tercet.data.cache import load_split
from tercet.data.ingest import IngestOptions
from tercet.data.text_stats import text_ids
from tercet.data.versions import publish, read_manifest
from tercet.errors import TercetError, TrainingError
from tercet.pipeline.run import _best, _evaluations
from tercet.planning.survey import read_plan, survey
from tercet.storage import Storage, open_storage
from tercet.storage.base import sha256_of
from tercet.storage.documents import seal
from tercet.storage.layout import attempt_folder
from tercet.training.ledger import verify_rows

OUTCOMES = ("refused", "fell back", "unaffected", "LOADED DAMAGED", "NO TYPED ERROR")
GOOD = OUTCOMES[:3]
DAMAGES = ("flip a bit", "cut", "append a byte", "swap", "delete")
METRIC = "ndcg@10"


class Run:
    """A finished run of two workers that was taken over once. What the first attempt wrote after that does not count,
    and is of the highest step. Beside it are a second dataset and a second version of its own dataset."""

    def __init__(self, folder: Path, store: Path, run_id: str, recipe: Path, triplets: Path) -> None:
        """store, run_id: a run as interrupted_run.py makes it; nothing in it is changed."""
        self.folder, self.run_id, self.recipe = folder, run_id, recipe
        shutil.copytree(store / "datasets", folder / "store" / "datasets")
        shutil.copytree(store / "runs" / run_id, folder / "store" / "runs" / run_id)
        storage = open_storage(str(folder / "store"))
        manifest = read_manifest(storage, "tiny")
        fewer = folder / "fewer.jsonl"
        fewer.write_text("".join(triplets.read_text().splitlines(keepends=True)[:200]))
        build_version([fewer], storage, "tiny", IngestOptions(group="group"))
        build_version([triplets], storage, "other", IngestOptions(group="group"))
        publish(storage, manifest)  # HEAD names it again
        storage.put(f"runs/{run_id}/plan.json", seal(make_plan(recipe, run_id)))
        self._take_over(storage)
        best = best_whole(storage, read_commits(storage, run_id), METRIC)
        assert best is not None
        publish_best(storage, run_id, best, "# A card")
        self.newest, *_ = read_commits(storage, run_id)
        with _warnings(folder / "store") as self.usual_warnings:
            self.expected = {name: load(self, folder / "store", folder / "cache") for name, load in LOADS.items()}
        self.steps = {
            commit.step: _state(commit, folder / "store" / commit.folder) for commit in read_commits(storage, run_id)
        }
        self.proofs = [self._proof_of(step) for step in self.steps]

    def _take_over(self, storage: Storage) -> None:
        last, *_ = read_commits(storage, self.run_id)
        lease = Lease(storage, self.run_id, "another", 60)
        later = lease.begin("later", last.step, 1)
        lease.release()
        for lineage, step in (((*last.lineage, later), last.step + 1), (last.lineage, last.step + 2)):
            files = fetch(storage, last, self.folder / f"step-{step}")
            (files / "model.safetensors").write_bytes(b"%d" % step + (files / "model.safetensors").read_bytes()[2:])
            for rank in range(lineage[-1].world_size):
                part = files if rank == 0 else self.folder / "nothing"
                upload_part(storage, part, attempt_folder(self.run_id, step, lineage[-1].name), rank)
            metrics = {METRIC: last.metrics[METRIC] - step / 1000}
            commit_step(storage, self.run_id, step, last.epoch, metrics, lineage, wait_seconds=1)

    def _proof_of(self, newest: int) -> Any:
        """What `verify` reports if this is the newest step."""
        copy = self.folder / f"up-to-{newest}"
        shutil.copytree(self.folder / "store", copy)
        for path in copy.glob("runs/*/checkpoints/*/COMMIT"):
            if int(path.parent.name) > newest:
                path.unlink()
        return verify(self, copy, copy)

    def objects(self, store: Path, cache: Path) -> dict[str, list[Path]]:
        """Keys of the objects that may be damaged, by kind."""
        run, newest = store / "runs" / self.run_id, store / self.newest.folder
        dataset = store / "datasets/tiny"
        version = dataset / "versions" / read_manifest(open_storage(str(self.folder / "store")), "tiny").version
        return {
            "checkpoint": [newest / path for path in self.newest.files],
            "COMMIT": sorted(run.glob("checkpoints/*/COMMIT")),
            "rank part": sorted(newest.glob("rank-*.json")),
            "LEASE.json": [run / "LEASE.json"],
            "plan.json": [run / "plan.json"],
            "best": sorted(path for path in (run / "best").rglob("*") if path.is_file()),
            "manifest": [version / "manifest.json"],
            "HEAD.json": [dataset / "HEAD.json"],
            "shard": sorted((version / "shards").iterdir()),
            "cached Arrow": sorted(cache.glob("shards/*.arrow")),
        }


def _state(commit: Commit, folder: Path) -> Any:
    """The files of a checkpoint, as they were loaded."""
    hashes = {path: sha256_of(folder / path) for path in commit.files}
    return commit.step, commit.epoch, commit.metrics, commit.lineage, hashes


# --- what the product does to load ----------------------------------------------------------------------------------


def resume(run: Run, store: Path, scratch: Path) -> Any:
    """Load the newest checkpoint as a worker does."""
    found = fetch_newest(open_storage(str(store)), run.run_id, scratch / "resume")
    return found and _state(found, scratch / "resume")


def choose(run: Run, store: Path, scratch: Path) -> Any:
    """Load the best checkpoint as the test evaluation does."""
    storage = open_storage(str(store))
    plan = make_plan(run.recipe, run.run_id)
    best = _best(storage, plan, _evaluations(storage, plan), Events(storage, run.run_id))
    return _state(best, fetch(storage, best, scratch / "best"))


def serve(run: Run, store: Path, scratch: Path) -> Any:
    """Load `best/` after publishing it again, as a restarted run does."""
    storage = open_storage(str(store))
    plan = make_plan(run.recipe, run.run_id)
    best = _best(storage, plan, _evaluations(storage, plan), Events(storage, run.run_id))
    publish_best(storage, run.run_id, best, "# A card")
    published = read_best(storage, run.run_id)
    assert published is not None
    return _state(published, fetch(storage, published, scratch / "published"))


def commit_again(run: Run, store: Path, scratch: Path) -> Any:
    """Commit the newest checkpoint again from the parts of its ranks, and load it."""
    storage = open_storage(str(store))
    newest = run.newest
    (store / newest.folder).with_name("COMMIT").unlink(missing_ok=True)
    commit_step(storage, run.run_id, newest.step, newest.epoch, newest.metrics, newest.lineage, wait_seconds=0.2)
    return resume(run, store, scratch)


def submit_again(run: Run, store: Path, scratch: Path) -> Any:  # noqa: ARG001
    """Derive the plan that a second `tercet train` would follow."""
    _, plan = survey(load_config(run.recipe, (f"storage.uri={store}",)), run.run_id)
    return plan.model_dump(exclude={"config"})


def verify(run: Run, store: Path, scratch: Path) -> Any:  # noqa: ARG001
    """Prove the rows of the run as `tercet runs verify` does."""
    storage = open_storage(str(store))
    proof = verify_rows(storage, read_plan(storage, run.run_id))
    if not proof.holds:
        raise TrainingError(proof.text())
    return proof.text()


def rows(run: Run, store: Path, scratch: Path) -> Any:  # noqa: ARG001
    """Load every text of the dataset, and which texts are equal. `scratch` is the cache."""
    storage = open_storage(str(store))
    manifest = read_manifest(storage, "tiny")
    splits = {split: load_split(storage, manifest, split, scratch) for split in manifest.splits}
    train = splits["train"]
    ids = text_ids(train)(np.arange(len(train)))
    return manifest, {name: split.to_list() for name, split in splits.items()}, ids.tolist()


LOADS: dict[str, Callable[[Run, Path, Path], Any]] = {
    "resume": resume,
    "choose": choose,
    "serve": serve,
    "submit_again": submit_again,
    "verify": verify,
    "rows": rows,
    "commit_again": commit_again,
}
OF_DATASETS = ("rows", "submit_again")


# --- one trial ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    kind: str
    damage: str
    path: Path
    outcome: str
    said: str


def trial(run: Run, rng: random.Random, scratch: Path, chosen: tuple[str, str] | None = None) -> Trial:
    """Draw an object and a damage, or take the chosen kind of each, do it to a copy, and load."""
    kinds = run.objects(run.folder / "store", run.folder / "cache")
    kind, damage = chosen or (rng.choice(sorted(kinds)), rng.choice(DAMAGES))
    path = rng.choice(kinds[kind])
    others = [
        *(other for several in kinds.values() for other in several),
        *(other for other in run.folder.rglob(path.name) if {"store", "cache"} & set(other.parts)),
        *(other for other in run.folder.rglob(f"*{path.suffix}") if other.is_file()),
    ]
    # An older HEAD.json of the same dataset is no damage: it was correct when it was written.
    swapped = rng.choice(sorted(other for other in others if other.read_bytes() != path.read_bytes()))
    relative = path.relative_to(run.folder)
    names = OF_DATASETS if relative.parts[0] == "cache" or relative.parts[1] == "datasets" else tuple(LOADS)
    outcomes, said = [], []
    draws = rng.random(), rng.randrange(8)
    for name in names:
        if name == "rows" and names != OF_DATASETS:
            continue
        copy = scratch / name
        for part in ("store", "cache"):
            shutil.copytree(run.folder / part, copy / part, copy_function=os.link)
        hurt(copy / relative, damage, swapped, *draws)
        # A damaged shard in storage is not read while the cache has a good copy.
        cache = copy / "cache" if relative.parts[0] == "cache" else copy / "empty"
        outcome, why = _outcome(run, name, copy / "store", cache)
        outcomes.append(outcome)
        said.append(f"{name}: {outcome} {why}".strip())
        shutil.rmtree(copy)
    worst = max(outcomes, key=("unaffected", "fell back", "refused", "LOADED DAMAGED", "NO TYPED ERROR").index)
    return Trial(kind, damage, relative, worst, "; ".join(said))


def hurt(path: Path, damage: str, other: Path, place: float, bit: int) -> None:
    """Damage a file silently, as a disk does: its modification time stays. `place` in [0, 1) is the position."""
    data, seen = path.read_bytes(), path.stat()
    path.unlink()  # the copy is made of links
    if damage == "delete":
        return
    where = int(place * len(data))
    flipped = data[:where] + bytes(byte ^ 1 << bit for byte in data[where : where + 1]) + data[where + 1 :]
    damaged = {"flip a bit": flipped, "cut": data[:where], "append a byte": data + bytes([bit])}
    path.write_bytes(other.read_bytes() if damage == "swap" else damaged[damage])
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def _outcome(run: Run, name: str, store: Path, cache: Path) -> tuple[str, str]:
    with _warnings(store) as said:
        try:
            found = LOADS[name](run, store, cache)
        except TercetError as error:
            return "refused", f"({type(error).__name__}: {error})"
        except Exception as error:  # noqa: BLE001 - a user would see a traceback
            return "NO TYPED ERROR", f"({type(error).__name__}: {error})"
    if found == run.expected[name]:
        return "unaffected", ""
    if name == "verify" and found in run.proofs:
        return "fell back", "(which its number of steps says)"
    warned = [text for text in said if text not in run.usual_warnings]
    if _is_older(found, run, name) and warned:
        return "fell back", warned[0]
    return "LOADED DAMAGED", str(found)[:500]


def _is_older(found: Any, run: Run, name: str) -> bool:
    """Whether every byte is of another checkpoint, or none exists and a run starts from the beginning."""
    if name == "serve":
        return _without_card(found, run)
    return found is None or (name in ("resume", "choose", "commit_again") and found == run.steps.get(found[0]))


def _without_card(found: Any, run: Run) -> bool:
    step, *_, hashes = found
    model = {path: value for path, value in hashes.items() if path != "README.md"}
    return step in run.steps and model.items() <= run.steps[step][-1].items()


@contextmanager
def _warnings(store: Path) -> Iterator[list[str]]:
    """Messages at WARNING or above, without the folder's name."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(  # type: ignore[method-assign]
        record.getMessage().replace(str(store), "")
    )
    logger = logging.getLogger("tercet")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
