"""The engine of a plan: a run keeps the one that it was started with, or is refused in words."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from support import builders
from tercet.config.recipe import Config
from tercet.data.versions import publish
from tercet.errors import CorruptObject, PlanError
from tercet.planning import plan as plan_module
from tercet.planning.plan import ENGINE, SUPPORTED_ENGINES, TrainPlan
from tercet.planning.survey import plan_of_file, read_plan, survey
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import seal, unseal
from tercet.training.ledger import verify_rows
from tercet.training.worker import run_worker

TODAY = datetime.datetime.now(datetime.UTC).date()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(str(tmp_path / "store"))
    publish(storage, builders.manifest())
    return storage


@pytest.fixture
def config(storage: Storage) -> Config:
    return builders.config(storage={"uri": storage.uri})


def support(monkeypatch: pytest.MonkeyPatch, *engines: int) -> None:
    """Act as a later tercet that supports these engines and starts new runs with the last."""
    monkeypatch.setattr(plan_module, "SUPPORTED_ENGINES", engines)
    monkeypatch.setattr(plan_module, "ENGINE", engines[-1])
    monkeypatch.setattr("tercet.planning.survey.ENGINE", engines[-1])


def started(storage: Storage, config: Config, **changes: Any) -> TrainPlan:
    """A run of today that was started with a plan in which these fields are changed."""
    plan = survey(config, today=TODAY)[1].model_copy(update=changes)
    storage.put(layout.plan_key(plan.run_id), seal(plan))
    return plan


def test_new_runs_have_the_engine_of_this_code(config: Config) -> None:
    assert survey(config)[1].engine == ENGINE == SUPPORTED_ENGINES[-1]


def test_a_plan_without_an_engine_is_of_engine_1(storage: Storage, config: Config, tmp_path: Path) -> None:
    plan = survey(config, today=TODAY)[1]
    document = plan.model_dump(mode="json")
    del document["engine"]
    first = json.dumps(document, indent=1)
    (tmp_path / "plan.json").write_text(first)
    assert plan_of_file(tmp_path / "plan.json").engine == 1
    sealed = _sealed(first)
    storage.put(layout.plan_key(plan.run_id), sealed)
    assert b'"engine"' not in sealed
    assert read_plan(storage, plan.run_id) == plan
    assert survey(config)[1] == plan


def _sealed(text: str) -> bytes:
    """JSON as `seal` stores it."""
    rest = text.removeprefix("{\n").encode() + b"\n"
    return b'{"sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode() + rest


def test_a_run_under_way_keeps_its_engine(storage: Storage, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = started(storage, config)
    support(monkeypatch, 1, 2)
    assert survey(config)[1].engine == survey(config, before.run_id)[1].engine == 1
    assert survey(config, "another")[1].engine == 2
    assert survey(builders.config(storage={"uri": storage.uri}, training={"seed": 7}))[1].engine == 2


def test_the_engine_is_no_part_of_the_experiment(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = survey(config)[1]
    support(monkeypatch, 1, 2)
    after = survey(config)[1]
    assert (before.engine, after.engine) == (1, 2)
    assert after.model_copy(update={"engine": 1}) == before
    assert after.lineage == before.lineage


def test_a_run_of_a_newer_engine_is_refused(storage: Storage, config: Config, tmp_path: Path) -> None:
    """Even if its plan has fields that this code does not know."""
    newer = started(storage, config, engine=ENGINE + 1)
    text = newer.model_dump_json(indent=1).replace("{\n", '{\n "shards": [],\n', 1)
    (tmp_path / "plan.json").write_text(text)
    for sealed in (seal(newer), _sealed(text)):
        storage.put(layout.plan_key(newer.run_id), sealed)
        for read in (
            lambda: survey(config),
            lambda: survey(config, newer.run_id),
            lambda: read_plan(storage, newer.run_id),
            lambda: plan_of_file(tmp_path / "plan.json"),
            lambda: run_worker(newer),
            lambda: verify_rows(storage, newer),
        ):
            with pytest.raises(PlanError) as caught:
                read()
            assert f"run {newer.run_id} was planned by a newer tercet: its engine is {ENGINE + 1}" in str(caught.value)
            assert "update tercet on this machine" in caught.value.hint


def test_an_engine_that_is_no_longer_supported(
    storage: Storage, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = started(storage, config)
    support(monkeypatch, 2, 3)
    for use in (lambda: survey(config), lambda: run_worker(older), lambda: verify_rows(storage, older)):
        with pytest.raises(PlanError) as caught:
            use()
        assert str(caught.value) == (
            f"this tercet no longer supports engine 1, with which run {older.run_id} was started; it supports 2, 3"
        )
        assert "use the version of tercet that started the run" in caught.value.hint
    assert read_plan(storage, older.run_id) == older  # its model may still be promoted
    storage.put(layout.report_key(older.run_id), builders.report(run_id=older.run_id).model_dump_json().encode())
    assert survey(config)[1] == older  # a finished run has its result


def test_damage_is_reported_before_the_engine() -> None:
    document = seal(builders.plan()).replace(b'"engine": 1', b'"engine": 9')
    with pytest.raises(CorruptObject, match="is damaged"):
        unseal(TrainPlan, document, "plan.json")
