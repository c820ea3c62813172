"""The store in `old_store/` was written before documents of all kinds were sealed; all of it is still read.

It was written by the code of commit 393eb53, every document by the function that wrote it then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import builders, published
from tercet.artifacts import journal
from tercet.artifacts.best import read_best
from tercet.artifacts.champion import Served, history
from tercet.artifacts.checkpoint import damage_of, fetch_newest
from tercet.artifacts.decision import CANDIDATE
from tercet.artifacts.lease import Lease, read_attempts
from tercet.artifacts.precision import Precision
from tercet.artifacts.registry import promote, read_decision, read_version, resolve
from tercet.artifacts.report import RunMetrics
from tercet.artifacts.training_log import Evaluation, TrainingLog
from tercet.config.sections import MiningConfig
from tercet.data.versions import publish, read_head, read_manifest
from tercet.evaluation.measurement import Request, read_measured
from tercet.pipeline.mining import read_mined
from tercet.pipeline.nightly import list_nights, read_night
from tercet.pipeline.onnx_export import Exported
from tercet.pipeline.publishers import Notification
from tercet.planning.survey import list_runs, read_plan, read_report
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import D, seal, sha256, unseal

RUN = "20260314-made-0a1b2c3d-4e5f6a7b"
VERSION = "4b83b2ab15a2ac2d"


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    shutil.copytree(Path(__file__).parent / "old_store", tmp_path / "store")
    return open_storage(str(tmp_path / "store"))


def read(storage: Storage, kind: type[D], key: str) -> D:
    return unseal(kind, storage.read(key), key)


def test_a_run(store: Storage, tmp_path: Path) -> None:
    assert list_runs(store) == [RUN]
    plan = read_plan(store, RUN)
    assert (plan.run_id, plan.num_steps, plan.format) == (RUN, 20, 1)
    assert [attempt.name for attempt in read_attempts(store, RUN)] == ["0001-abcd"]
    commit = fetch_newest(store, RUN, tmp_path / "local")
    assert commit is not None
    assert (commit.step, (tmp_path / "local/model.safetensors").read_bytes()) == (10, b"weights")
    assert read(store, Precision, layout.precision_key(RUN)).precision == "fp32"
    entries = [read(store, Evaluation, layout.evaluation_key(RUN, step)).entry() for step in (0, 10, 20)]
    assert tuple(entries) == builders.metrics().evaluations
    log = read(store, TrainingLog, layout.training_key(RUN))
    assert (log.storage_retries, log.log_history) == ({"503": 2}, builders.LOG_HISTORY)
    assert journal.counts(store, RUN) == {"hung": 1}
    assert read(store, RunMetrics, layout.metrics_key(RUN)) == builders.metrics()
    assert read_report(store, RUN) == builders.report()
    best = read_best(store, RUN)
    assert best is not None
    assert damage_of(store, best) is None
    assert read_measured(store, RUN, Request(role=CANDIDATE, commit=commit, out_of_domain={})) is not None


def test_a_run_is_taken_over(store: Storage) -> None:
    lease = Lease(store, RUN, "another driver", seconds=30)
    assert lease.generation == 2
    lease.begin("0002-abcd", 10, 1)
    lease.release()
    assert [attempt.first_step for attempt in read_attempts(store, RUN)] == [0, 10]


def test_a_dataset(store: Storage) -> None:
    assert read_head(store, "poems") == VERSION
    assert read_manifest(store, "poems").content == VERSION == builders.manifest().version
    mined = read_mined(store, "poems-mined", VERSION, MiningConfig())
    assert mined is not None
    assert mined.model == "someone/model"
    publish(store, builders.manifest(train=200))
    assert read_head(store, "poems") == builders.manifest(train=200).version


def test_a_model_and_its_chain_of_champions(store: Storage) -> None:
    chain = history(store, "made")
    assert [(champion.kind, champion.version) for champion in chain] == [("rollback", 1), ("gated", 2), ("gated", 1)]
    champion, version = resolve(store, "made")
    assert (champion, version.lineage.run_id) == (chain[0], RUN)
    assert damage_of(store, version.commit) is None
    for older in chain[1:]:
        assert older.decision is not None
        assert read_decision(store, older.decision).verdict == "promote"
        assert older.decision == layout.decision_key("made", sha256(store.read(older.decision)))
    assert read(store, Notification, layout.notification_key("made", "webhook", 3)).where == "https://example.org"
    assert list_nights(store, "made") == [RUN]
    night = read_night(store, "made", RUN)
    assert night is not None
    assert night.outcome == "promoted"
    assert read(store, Exported, layout.exported_key("made", 1)).metrics == {"ndcg@10": 0.5}


def test_the_next_promotion_continues_the_chain(store: Storage) -> None:
    before = store.read(layout.champion_key("made"))
    lineage = published.finished_run(store, "20260316-made-0a1b2c3d-6e5f6a7b")
    champion = promote(store, "made", lineage, lambda _: published.decision(), "nightly").champion
    assert champion is not None
    assert (champion.generation, champion.version, champion.parent_sha256) == (4, 3, sha256(before))
    assert store.read(layout.generation_key("made", 3)) == before
    assert store.read(layout.generation_key("made", 4)) == seal(champion)
    assert [champion.generation for champion in history(store, "made")] == [4, 3, 2, 1]
    assert resolve(store, "made")[1] == read_version(store, "made", 3)
    served = [read(store, Served, layout.served_key("made", number)) for number in (1, 2, 3)]
    assert [mark.generation for mark in served] == [1, 2, 4]  # version 1 was the champion of generation 3 too


def test_a_run_that_was_the_champion_is_not_promoted_again(store: Storage) -> None:
    for run_id in (RUN, "20260315-made-0a1b2c3d-5e5f6a7b"):
        lineage = published.finished_run(store, run_id)
        promotion = promote(store, "made", lineage, lambda _: pytest.fail("it was gated again"), "nightly")
        assert promotion.decision is None
