"""The run that a recipe belongs to: a named one, an unfinished one, or a new one."""

from __future__ import annotations

import datetime
import logging
from collections import Counter
from pathlib import Path
from typing import IO

import pytest

from support import builders
from support.published import finished_run
from tercet.artifacts.registry import register, serve
from tercet.config.recipe import Config
from tercet.data.versions import publish
from tercet.errors import ConfigError
from tercet.planning.plan import make_run_id
from tercet.planning.survey import find_run, plan_of_file, read_report, survey
from tercet.storage import Storage, layout, open_storage
from tercet.storage.base import Fetched
from tercet.storage.documents import seal
from tercet.storage.layout import plan_key
from tercet.storage.local import LocalStorage

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
    """Start a run this many days ago, and return its id."""
    run_id = make_run_id(config, VERSIONS, days_ago(num_days))
    storage.put(plan_key(run_id), seal(builders.plan().model_copy(update={"run_id": run_id})))
    return run_id


def ended(storage: Storage, run_id: str, status: str) -> None:
    report = builders.report(status=status)
    storage.put(f"runs/{run_id}/report.json", report.model_dump_json().encode())


def resumed(storage: Storage, config: Config) -> str | None:
    """Return the run that is resumed today; None if a new run starts, or today's run has a result."""
    run_id, earlier = find_run(storage, config, VERSIONS, builders.TODAY)
    report = read_report(storage, run_id)
    assert earlier is None or earlier.run_id == run_id
    assert earlier is not None or run_id == make_run_id(config, VERSIONS, builders.TODAY)
    return None if earlier is None or (report is not None and report.status == "finished") else run_id


@pytest.mark.parametrize("num_days", [0, 1, 7])
def test_a_run_without_a_result_is_resumed(
    storage: Storage, config: Config, num_days: int, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = started(storage, config, num_days)
    with caplog.at_level(logging.WARNING, "tercet"):
        assert resumed(storage, config) == run_id
    assert (f"resuming run {run_id}" in caplog.text) == (num_days > 0)  # today's run is what a user expects
    ended(storage, run_id, "failed")
    assert resumed(storage, config) == run_id
    ended(storage, run_id, "finished")
    assert resumed(storage, config) is None


def test_a_run_with_a_damaged_plan_is_not_resumed(storage: Storage, config: Config) -> None:
    run_id = started(storage, config, 1)
    storage.put(plan_key(run_id), storage.read(plan_key(run_id)).replace(b"made", b"maid"))
    assert resumed(storage, config) is None


def test_only_the_newest_run_is_resumed(storage: Storage, config: Config) -> None:
    started(storage, config, 3)
    ended(storage, started(storage, config, 2), "finished")
    assert resumed(storage, config) is None
    newest = started(storage, config, 1)
    assert resumed(storage, config) == newest


def test_runs_of_another_recipe_of_other_data_or_of_long_ago_are_not_resumed(storage: Storage, config: Config) -> None:
    started(storage, config, 8)
    started(storage, builders.config(training={"seed": 7}), 1)
    storage.put(plan_key(make_run_id(config, ["other"], days_ago(1))), b"a plan")
    assert resumed(storage, config) is None


def test_a_survey_resumes_the_run(storage: Storage, config: Config) -> None:
    publish(storage, builders.manifest())
    today = datetime.datetime.now(datetime.UTC).date()
    _, fresh = survey(config, today=today)
    _, before = survey(config, today=today - datetime.timedelta(days=1))
    assert before.run_id != fresh.run_id
    storage.put(plan_key(before.run_id), seal(before))
    assert survey(config)[1].run_id == before.run_id
    assert survey(config, "mine")[1].run_id == "mine"


@pytest.mark.parametrize("run_id", ["", "a/b", "../x", ".hidden", "a b", "x" * 201])
def test_impossible_run_ids(config: Config, run_id: str) -> None:
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


class CountingStorage(LocalStorage):
    """Counts the requests for each key."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: Counter[str] = Counter()

    def exists(self, key: str) -> bool:
        self.requests[key] += 1
        return super().exists(key)

    def _fetch(self, key: str, sink: IO[bytes]) -> Fetched:
        self.requests[key] += 1
        return super()._fetch(key, sink)


@pytest.mark.parametrize("state", ["new", "unfinished", "finished", "of yesterday", "named"])
@pytest.mark.parametrize("start_from", ["base", "champion"])
def test_a_plan_and_a_champion_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, start_from: str
) -> None:
    storage = CountingStorage(tmp_path)
    monkeypatch.setattr("tercet.planning.survey.open_storage", lambda *_: storage)
    publish(storage, builders.manifest())
    version = register(storage, "made", finished_run(storage, "before"), "who", None)
    serve(storage, version, None, "by hand", "the first", "who")
    config = builders.config(storage={"uri": storage.uri}, model={"start_from": start_from})
    today = datetime.datetime.now(datetime.UTC).date()
    run_id = "mine" if state == "named" else None
    before = survey(config, run_id, today - datetime.timedelta(days=state == "of yesterday"))[1]
    assert (before.champion is not None) == (start_from == "champion")
    if state != "new":
        storage.put(layout.plan_key(before.run_id), seal(before))
    if state == "finished":
        ended(storage, before.run_id, "finished")
    storage.requests.clear()
    assert survey(config, run_id)[1] == before
    requests = {key: num for key, num in storage.requests.items() if key.endswith(("plan.json", "champion.json"))}
    assert set(requests.values()) == {1}
    assert layout.plan_key(before.run_id) in requests
    # A run that was started has its champion in its plan.
    assert (layout.champion_key("made") in requests) == (state == "new" and start_from == "champion")


def test_a_run_id_of_another_recipe_or_other_data_is_refused(storage: Storage, config: Config) -> None:
    publish(storage, builders.manifest())
    storage.put(layout.plan_key("mine"), seal(survey(config, "mine")[1]))
    changed = builders.config(storage={"uri": storage.uri}, training={"seed": 7})
    with pytest.raises(ConfigError, match="run mine exists with another recipe"):
        survey(changed, "mine")
    publish(storage, builders.manifest(train=106))
    with pytest.raises(ConfigError, match="run mine exists with another dataset version") as caught:
        survey(config, "mine")
    assert caught.value.hint == "omit --run-id, or choose a new one"
