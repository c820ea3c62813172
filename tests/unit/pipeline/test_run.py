"""A run has one recipe and one version of each dataset, learns something, and survives damaged events."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import builders
from tercet.artifacts.journal import Events, report_incident
from tercet.artifacts.training_log import TrainingLog
from tercet.config.recipe import as_yaml
from tercet.data.versions import publish
from tercet.errors import ConfigError, LearnedNothing
from tercet.pipeline.run import _as_trained, _incidents, _metrics, run
from tercet.planning.survey import survey
from tercet.storage import layout, open_storage
from tercet.storage.documents import seal


def test_a_run_is_not_resumed_with_another_version_of_a_mixed_dataset(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, builders.manifest())
    publish(storage, builders.mixed_manifest("docs"))
    config = builders.config(storage={"uri": str(tmp_path)}, mix=[{"name": "docs"}])
    _, plan = survey(config, "mine", builders.TODAY)
    assert [part.version for part in plan.datasets] == [
        builders.manifest().version,
        builders.mixed_manifest("docs").version,
    ]
    storage.put("runs/mine/plan.json", seal(plan))
    publish(storage, builders.mixed_manifest("docs", train=60))
    with pytest.raises(ConfigError, match="run mine exists with another dataset version"):
        run(config, "mine")


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_whose_evaluations_are_all_equal_has_learned_nothing(changed: bool) -> None:
    """Even if the weights have changed."""
    evaluations = [{"step": float(step), "epoch": step / 10, "loss": 5.0, "ndcg@10": 0.4} for step in (0, 10, 20)]
    evaluations[2]["loss"] -= 1e-12 * changed
    test = {"baseline": {"ndcg@10": 0.5}, "best": {"ndcg@10": 0.5}}
    if changed:
        assert _metrics(evaluations, 10, test).best_step == 10
    else:
        with pytest.raises(LearnedNothing, match="all 3 evaluations are equal in every digit"):
            _metrics(evaluations, 10, test)


@pytest.mark.parametrize(
    ("named", "shown"), [(None, "bf16"), ("fp32", "fp32"), ("auto", "auto")], ids=["not-set", "named", "auto"]
)
def test_the_card_and_the_report_name_the_precision(named: str | None, shown: str) -> None:
    log = TrainingLog(
        resumed_from_step=0,
        world_size=1,
        parallelism="ddp",
        precision="bf16",
        device="cuda:0",
        seconds={},
        storage_retries={},
        first_step_unix_seconds=None,
        log_history=[],
    )
    trained = _as_trained(builders.plan(training={"precision": named}), log)
    assert f"precision: {shown}\n" in as_yaml(trained.config)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_events_are_started_again(tmp_path: Path, content: bytes) -> None:
    storage = open_storage(str(tmp_path))
    storage.put("runs/mine/events.jsonl", content)
    Events(storage, "mine").add("start started")
    assert len(storage.read("runs/mine/events.jsonl").splitlines()) == 1
    Events(storage, "mine").add("start started")
    assert len(storage.read("runs/mine/events.jsonl").splitlines()) == 2


def test_a_damaged_training_log_does_not_keep_the_report_from_being_written(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    report_incident(storage, "mine", "0001-end", "hung", "rank 1 hung for 8 s")
    storage.put(layout.training_key("mine"), b"{")
    assert _incidents(storage, "mine")["hung"] == 1
