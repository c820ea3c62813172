"""A run with `use_gpu: false` leaves the GPUs of its machine alone, in every process that loads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import tiny_model
from tercet.artifacts.decision import BASE_MODEL
from tercet.cluster import session
from tercet.config.recipe import Config
from tercet.config.sections import MiningConfig, WorkersConfig
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.versions import read_manifest
from tercet.evaluation.evaluate import evaluate_test
from tercet.evaluation.measurement import Request, measure, read_measured
from tercet.model import encoder
from tercet.model.devices import own_device
from tercet.pipeline import nightly
from tercet.pipeline.mining import Pool, mine_pool
from tercet.planning.plan import TrainPlan
from tercet.planning.survey import survey
from tercet.storage import Storage, open_storage

NUM_ROWS = 60


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    path, storage = tmp_path / "rows.jsonl", open_storage(str(tmp_path / "store"))
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_model.triplets(NUM_ROWS)))
    build_version([path], storage, "tiny", IngestOptions(group="group"), fractions=(0.5, 0.1, 0.4))
    return storage


def planned(storage: Storage, model_dir: Path, use_gpu: bool) -> TrainPlan:
    document = tiny_model.recipe(model_dir, storage.uri, workers={"use_gpu": use_gpu})
    return survey(Config.model_validate(document), "a-run")[1]


def call(task: str, plan: TrainPlan, storage: Storage) -> None:
    if task == "test":
        evaluate_test(plan, None)
    elif task == "measure":
        measure(plan, Request(role=BASE_MODEL, commit=None, out_of_domain={}))
    else:
        mine_pool(plan.config, read_manifest(storage, "tiny"), None, MiningConfig(), Pool("train", 0, 20))


@pytest.mark.parametrize("task", ["test", "measure", "mine"])
def test_without_a_gpu_in_the_plan_none_is_used(
    task: str, storage: Storage, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says that there is one. Whatever used it would fail, because there is none."""
    plan = planned(storage, tiny_model_dir, use_gpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    call(task, plan, storage)
    assert not torch.cuda.is_initialized()


class LoadedOn(BaseException):
    """Says on which device a model was to be loaded. No Exception: those are reported as damage to the model."""


@pytest.mark.parametrize("use_gpu", [False, True])
@pytest.mark.parametrize("task", ["test", "measure", "mine"])
def test_a_model_is_loaded_on_the_plans_device(
    task: str, use_gpu: bool, storage: Storage, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, device: str | None, **__: Any) -> None:
        raise LoadedOn(device)

    plan = planned(storage, tiny_model_dir, use_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(encoder, "SentenceTransformer", load)
    with pytest.raises(LoadedOn, match="^cuda$" if use_gpu else "^cpu$"):
        call(task, plan, storage)


@pytest.mark.parametrize(
    ("use_gpu", "has_gpu", "device"),
    [(False, True, "cpu"), (True, True, "cuda"), ("auto", True, "cuda"), (True, False, "cpu"), ("auto", False, "cpu")],
)
def test_the_own_device(use_gpu: Any, has_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert own_device(WorkersConfig(use_gpu=use_gpu)) == device


def test_a_night_measures_on_the_devices_that_the_cluster_has(
    storage: Storage, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use_gpu: auto` is decided before the processes start: they cannot see what was reserved for them."""
    document = tiny_model.recipe(tiny_model_dir, storage.uri, workers={"use_gpu": "auto"})
    plan = survey(Config.model_validate(document), "a-run")[1]
    seen: list[Any] = []

    def decided(config: Config) -> Config:
        return config.model_copy(update={"workers": config.workers.model_copy(update={"use_gpu": False})})

    def in_processes(workers: WorkersConfig, tasks: dict[str, Any]) -> None:
        seen.extend([workers.use_gpu, *(task.args[0].config.workers.use_gpu for task in tasks.values())])

    monkeypatch.setattr(session, "start_ray", lambda _: None)
    monkeypatch.setattr(session, "with_devices", decided)
    monkeypatch.setattr(session, "in_fresh_processes", in_processes)
    nightly._measured(storage, plan, [Request(role=BASE_MODEL, commit=None, out_of_domain={})])
    assert seen == [False, False]
    assert read_measured(storage, plan.run_id, Request(role=BASE_MODEL, commit=None, out_of_domain={})) is None
