"""Which run a recipe is: the one that is named, the one that did not get to its end, or a new one."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import pytest

from support import builders
from tercet.config.recipe import Config
from tercet.data.versions import publish
from tercet.errors import ConfigError
from tercet.planning.plan import make_run_id
from tercet.planning.survey import plan_of_file, survey, unfinished_run
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal
from tercet.storage.layout import plan_key

VERSIONS = [builders.manifest().version]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


@pytest.fixture
def config(storage: Storage) -> Config:
    return builders.config(storage={"uri": storage.uri})


def days_ago(num_days: int) -> datetime.date:
    return builders.TODAY - datetime.timedelta(days=num_days)


def started(storage: Storage, config: Config, num_days: int) -> str:
    """A run that was started so many days ago."""
    run_id = make_run_id(config, VERSIONS, days_ago(num_days))
    storage.put(plan_key(run_id), seal(builders.plan().model_copy(update={"run_id": run_id})))
    return run_id


def ended(storage: Storage, run_id: str, status: str) -> None:
    report = builders.report(status=status)
    storage.put(f"runs/{run_id}/report.json", report.model_dump_json().encode())


@pytest.mark.parametrize("num_days", [0, 1, 7])
def test_a_run_without_a_result_is_gone_on_with(
    storage: Storage, config: Config, num_days: int, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = started(storage, config, num_days)
    with caplog.at_level(logging.WARNING, "tercet"):
        assert unfinished_run(storage, config, VERSIONS, builders.TODAY) == run_id
    assert (f"going on with run {run_id}" in caplog.text) == (num_days > 0)  # today's is what a person expects
    ended(storage, run_id, "failed")
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) == run_id
    ended(storage, run_id, "finished")
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) is None


def test_a_damaged_plan_is_left_behind(storage: Storage, config: Config) -> None:
    run_id = started(storage, config, 1)
    storage.put(plan_key(run_id), storage.read(plan_key(run_id)).replace(b"made", b"maid"))
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) is None


def test_the_newest_decides(storage: Storage, config: Config) -> None:
    started(storage, config, 3)
    ended(storage, started(storage, config, 2), "finished")
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) is None
    newest = started(storage, config, 1)
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) == newest


def test_another_recipe_other_data_or_long_ago_is_another_run(storage: Storage, config: Config) -> None:
    started(storage, config, 8)
    started(storage, builders.config(training={"seed": 7}), 1)
    storage.put(plan_key(make_run_id(config, ["other"], days_ago(1))), b"a plan")
    assert unfinished_run(storage, config, VERSIONS, builders.TODAY) is None


def test_a_survey_finds_it(storage: Storage, config: Config) -> None:
    publish(storage, builders.manifest())
    today = datetime.datetime.now(datetime.UTC).date()
    _, fresh = survey(config, today=today)
    _, before = survey(config, today=today - datetime.timedelta(days=1))
    assert before.run_id != fresh.run_id
    storage.put(plan_key(before.run_id), seal(before))
    assert survey(config)[1].run_id == before.run_id
    assert survey(config, "mine")[1].run_id == "mine"


@pytest.mark.parametrize("run_id", ["", "a/b", "../x", ".hidden", "a b", "x" * 201])
def test_what_cannot_be_a_run_id(config: Config, run_id: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a run id"):
        survey(config, run_id)


def test_a_plan_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(builders.plan().model_dump_json())
    assert plan_of_file(path) == builders.plan()
    for text in ("{}", "nothing"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not a plan") as caught:
            plan_of_file(path)
        assert "tercet plan RECIPE --json" in caught.value.hint
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="is not a plan"):
            plan_of_file(missing)
