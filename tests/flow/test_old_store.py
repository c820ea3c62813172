"""A store written by commit 393eb53, before the files moved into wings, is read, resumed, verified and promoted.

`tests/fixtures/store_393eb53.tar.xz` holds the store, the recipes of its runs, and the Python package that carries
their model of 25,000 weights. The store has a dataset of two versions, a finished run, a night that made the first
champion, and a run that was killed while its second checkpoint was uploaded.
Never rebuild the archive: its age is its purpose.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.commands import PROGRAMS, check, run_command
from support.workers import commits, final_weights, largest_difference, model_folder, training_log
from tercet.artifacts.champion import history, read_champion
from tercet.artifacts.registry import read_decision, resolve
from tercet.config.recipe import load_config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.versions import read_head, read_manifest
from tercet.planning.survey import read_plan, read_report, survey
from tercet.storage import open_storage
from tercet.training.ledger import read as read_ledger

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "store_393eb53.tar.xz"
FIRST_VERSION = "3f3937e140efa814"
NIGHT = "20261129-tiny-379e1fab-0c0a00b0"


@dataclass(frozen=True)
class OldStore:
    """The unpacked archive, and commands over it."""

    folder: Path
    environment: dict[str, str]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def tercet(self, *arguments: Any) -> str:
        """Run a command that has to succeed, with its one worker in its own process; return what it printed."""
        command = [sys.executable, str(PROGRAMS / "train_without_ray.py"), *map(str, arguments)]
        return check(self._run(command)).stdout

    def train(self, recipe: str, run_id: str, version: str = "latest") -> str:
        """`tercet train` with a recipe of the archive, on a version of its dataset."""
        values = [f"storage.uri={self.store}", f"dataset.version={version}"]
        flags = [flag for value in values for flag in ("--set", value)]
        return self.tercet("train", self.folder / f"{recipe}.yaml", "--run-id", run_id, *flags)

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return run_command(command, self.environment, self.folder)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> OldStore:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    paths = [str(folder / "models"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return OldStore(folder, {**environment, "PYTHONPATH": os.pathsep.join(paths)})


def test_its_documents_are_read(old: OldStore) -> None:
    storage = open_storage(str(old.store))
    newest = read_manifest(storage, "tiny")
    assert (read_head(storage, "tiny"), newest.num_rows["train"]) == (newest.version, 318)
    champion, version = resolve(storage, "tiny")
    assert (champion.generation, version.lineage.run_id) == (1, NIGHT)
    assert champion.decision is not None
    assert read_decision(storage, champion.decision).verdict == "promote"
    report = read_report(storage, "finished")
    assert report is not None
    assert (report.status, report.num_steps) == ("finished", 11)
    assert read_plan(storage, "interrupted").num_steps == 19
    lists = [old.tercet(*what, "--storage", old.store) for what in (["runs", "list"], ["datasets", "list"])]
    assert "finished" in lists[0]
    assert "tiny" in lists[1]
    assert NIGHT in old.tercet("nights", "tiny", "--storage", old.store)
    assert NIGHT in old.tercet("models", "lineage", "tiny", "--storage", old.store)


def test_its_recipes_are_the_same_experiments(old: OldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(old.folder / "models"))
    config = load_config(old.folder / "night.yaml", [f"storage.uri={old.store}"])
    _, plan = survey(config, today=datetime.date(2026, 11, 29))
    assert plan.run_id == NIGHT


def test_the_same_rows_become_the_same_version(tmp_path: Path) -> None:
    from support import tiny_model

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_model.triplets(400)[:240]))
    storage = open_storage(str(tmp_path / "store"))
    version = build_version([rows], storage, "tiny", IngestOptions(group="group")).manifest.version
    assert version == FIRST_VERSION


def test_a_finished_run_is_verified_and_not_trained_again(old: OldStore) -> None:
    assert "step 1/" not in old.train("finished", "finished", FIRST_VERSION)
    assert "11 of 11 steps" in old.tercet("runs", "verify", "finished", "--storage", old.store)


def test_an_interrupted_run_resumes_to_the_weights_of_a_whole_one(old: OldStore) -> None:
    assert [commit.step for commit in commits(old.store, "interrupted")] == [4]
    old.train("interrupted", "interrupted")
    old.train("interrupted", "whole")
    assert training_log(old.store, "interrupted")["resumed_from_step"] == 4
    ledgers = [read_ledger(model_folder(old.store, commits(old.store, run)[0])) for run in ("interrupted", "whole")]
    assert ledgers[0].tolist() == ledgers[1].tolist()
    # Equal in every bit on the machine that wrote the archive. Another processor may round its first steps differently.
    weights = [final_weights(old.store, run_id) for run_id in ("interrupted", "whole")]
    assert largest_difference(*weights) < 1e-4
    assert "19 of 19 steps" in old.tercet("runs", "verify", "interrupted", "--storage", old.store)


def test_its_runs_are_promoted_and_rolled_back(old: OldStore) -> None:
    to = ("--storage", old.store, "--reason", "as a test")
    old.tercet("models", "promote", "tiny", "--run", "finished", *to)
    storage = open_storage(str(old.store))
    assert [champion.generation for champion in history(storage, "tiny")] == [2, 1]
    old.tercet("models", "rollback", "tiny", *to)
    champion = read_champion(storage, "tiny")
    assert champion is not None
    assert (champion.generation, champion.version, champion.kind) == (3, 1, "rollback")
    assert [champion.version for champion in history(storage, "tiny")] == [1, 2, 1]
