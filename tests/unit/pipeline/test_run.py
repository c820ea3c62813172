"""A run has one recipe and one version of each dataset, learns something, and survives damaged events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import builders
from tercet.artifacts.journal import Events, report_incident
from tercet.artifacts.training_log import TrainingLog
from tercet.cluster import devices
from tercet.config.recipe import as_yaml
from tercet.data.versions import publish
from tercet.errors import ConfigError, LearnedNothing, PlanError
from tercet.pipeline.run import _as_trained, _incidents, _metrics, _with_gpu_memory, run
from tercet.planning import gpus
from tercet.planning.survey import read_plan, survey
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


@pytest.mark.parametrize(
    ("workers", "gpu_bytes", "reason"),
    [
        ({"use_gpu": True}, 80 * 2**30, "auto: it fits into the 80.0 GiB of a worker, and no mode is faster"),
        ({"use_gpu": True}, None, "the memory of a worker is unknown"),
        ({"use_gpu": False}, 80 * 2**30, "auto: it fits into the"),  # of this machine
        ({"use_gpu": True, "memory_gib_per_worker": 9}, 80 * 2**30, "auto: it fits into the 9.0 GiB of a worker"),
        ({"use_gpu": True, "parallelism": "zero1"}, 80 * 2**30, "as the recipe says"),
    ],
)
def test_the_memory_of_the_clusters_gpus_decides_the_parallelism(
    workers: dict[str, Any],
    gpu_bytes: int | None,
    reason: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, builders.manifest())
    model = {"name_or_path": str(tiny_model_dir)}
    config = builders.config(storage={"uri": str(tmp_path)}, model=model, workers=workers)
    monkeypatch.setattr(gpus, "bytes_of_this_machine", lambda: None)
    _, plan = survey(config, "mine")
    storage.put("runs/mine/plan.json", seal(plan))
    monkeypatch.setattr(devices, "gpu_bytes", lambda: gpu_bytes)
    assert reason in _with_gpu_memory(storage, plan).parallelism_reason
    assert reason in read_plan(storage, "mine").parallelism_reason


def test_a_gpu_that_is_too_small_is_noticed_when_ray_knows_its_type(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, builders.manifest())
    model = {"name_or_path": str(tiny_model_dir)}
    config = builders.config(storage={"uri": str(tmp_path)}, model=model, workers={"use_gpu": True})
    monkeypatch.setattr(gpus, "bytes_of_this_machine", lambda: None)
    _, plan = survey(config, "mine")
    monkeypatch.setattr(devices, "gpu_bytes", lambda: 2**30)
    with pytest.raises(PlanError, match="the model does not fit into a worker"):
        _with_gpu_memory(storage, plan)
