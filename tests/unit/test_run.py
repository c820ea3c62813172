"""A run id belongs to one recipe and to one version of each of its datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

import made
from tercet.errors import ConfigError, LearnedNothing
from tercet.manifest import publish
from tercet.run import Events, _metrics, run
from tercet.sealed import seal
from tercet.storage import open_storage
from tercet.survey import survey


def test_a_run_is_not_resumed_with_another_version_of_a_mixed_dataset(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, made.manifest())
    publish(storage, made.mixed_manifest("docs"))
    config = made.config(storage={"uri": str(tmp_path)}, mix=[{"name": "docs"}])
    _, plan = survey(config, "mine", made.TODAY)
    assert [part.version for part in plan.datasets] == [
        made.manifest().version,
        made.mixed_manifest("docs").version,
    ]
    storage.put("runs/mine/plan.json", seal(plan))
    publish(storage, made.mixed_manifest("docs", train=60))
    with pytest.raises(ConfigError, match="run mine exists with another dataset version"):
        run(config, "mine")


@pytest.mark.parametrize("changed", [False, True])
def test_evaluations_that_are_equal_in_every_digit_are_no_result(changed: bool) -> None:
    """The weights moved, and the model is as it was: a run like the first one of the published recipe."""
    evaluations = [{"step": float(step), "epoch": step / 10, "loss": 5.0, "ndcg@10": 0.4} for step in (0, 10, 20)]
    evaluations[2]["loss"] -= 1e-12 * changed
    test = {"baseline": {"ndcg@10": 0.5}, "best": {"ndcg@10": 0.5}}
    if changed:
        assert _metrics(evaluations, 10, test).best_step == 10
    else:
        with pytest.raises(LearnedNothing, match="all 3 evaluations are equal in every digit"):
            _metrics(evaluations, 10, test)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_events_are_begun_anew(tmp_path: Path, content: bytes) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("runs/mine/events.jsonl", content)
    Events(storage, "mine").add("start started")
    assert len(storage.read("runs/mine/events.jsonl").splitlines()) == 1
    Events(storage, "mine").add("start started")
    assert len(storage.read("runs/mine/events.jsonl").splitlines()) == 2
