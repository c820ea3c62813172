"""The precision of a run: named, measured (`auto`), or the default of its first device. Then it is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support import builders
from tercet.artifacts.lease import Attempt, Holder
from tercet.artifacts.precision import Precision, read_precision
from tercet.data.versions import publish
from tercet.errors import CorruptObject, PlanError
from tercet.model.precision import computing_exactly, computing_in, default_precision
from tercet.planning.plan import TrainPlan
from tercet.planning.survey import survey
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import seal
from tercet.training import precision
from tercet.training.precision import choose, resolve_precision, speed_ups

Gpu = Callable[[bool, tuple[int, int]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Make torch describe a GPU: whether it computes in bf16, and its compute capability."""

    def describe(has_bf16: bool, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return describe


def attempted(run_id: str) -> Holder:
    """Return the lease of a run with one attempt."""
    attempt = Attempt(name="0001-abcd", generation=1, first_step=0, world_size=1)
    return Holder(run_id=run_id, generation=1, owner="a", place="b", pid=1, since_unix_seconds=0.0, attempts=(attempt,))


def with_precision(plan: TrainPlan, named: str | None) -> TrainPlan:
    training = plan.config.training.model_copy(update={"precision": named})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"training": training})})


def resolved(plan: TrainPlan, storage: Storage, on_cpu: bool = True) -> str | None:
    return resolve_precision(plan, storage, on_cpu).config.training.precision


@pytest.mark.parametrize(("speed_up", "expected"), [(0.0, "fp32"), (1.0, "fp32"), (1.19, "fp32"), (1.2, "bf16")])
def test_bf16_is_chosen_if_it_is_clearly_faster(speed_up: float, expected: str) -> None:
    choice = choose("cpu", {"bf16": speed_up})
    assert (choice.precision, choice.speed_up) == (expected, speed_up)


@pytest.mark.parametrize(
    ("speed_ups", "expected"),
    [
        ({}, ("fp32", 0.0)),
        ({"tf32": 1.1}, ("fp32", 1.1)),
        ({"tf32": 5.0}, ("tf32", 5.0)),
        ({"tf32": 5.0, "bf16": 5.5}, ("tf32", 5.0)),
        ({"tf32": 5.0, "bf16": 9.0}, ("bf16", 9.0)),
        ({"tf32": 1.1, "bf16": 1.3}, ("bf16", 1.3)),
    ],
)
def test_a_less_exact_precision_must_be_clearly_faster_than_each_more_exact_one(
    speed_ups: dict[str, float], expected: tuple[str, float]
) -> None:
    choice = choose("cuda:0", speed_ups)
    assert (choice.precision, choice.speed_up) == expected


def test_the_first_choice_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the next machine measures something else."""
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    asked: list[str] = []
    for speed_up, expected in ((1.7, "bf16"), (0.5, "bf16")):
        measured = {"bf16": speed_up}
        monkeypatch.setattr(precision, "speed_ups", lambda device, all=measured: asked.append(device) or all)
        with caplog.at_level(logging.INFO, "tercet"):
            assert resolved(plan, storage) == expected
        assert caplog.records[-1].getMessage() == "precision: bf16 (bf16 is 1.7 times as fast as fp32 on cpu)"
    assert asked == ["cpu"]


def test_the_first_of_two_concurrent_measurements_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})

    def measure(_: str) -> dict[str, float]:
        monkeypatch.setattr(precision, "speed_ups", lambda _: {"bf16": 0.5})
        assert resolved(plan, storage) == "fp32"
        return {"bf16": 3.0}

    monkeypatch.setattr(precision, "speed_ups", measure)
    assert resolved(plan, storage) == "fp32"


@pytest.mark.parametrize("named", ["fp32", None])
def test_nothing_is_measured_unless_the_recipe_asks(
    named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on a CPU nothing is stored."""
    monkeypatch.setattr(precision, "speed_ups", lambda _: pytest.fail("measured"))
    plan = builders.plan(training={"precision": named})
    assert resolved(plan, open_storage(str(tmp_path))) == "fp32"
    assert not list(tmp_path.rglob("*.json"))


def test_a_damaged_choice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "speed_ups", lambda _: {"bf16": 2.0})
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    resolve_precision(plan, storage, on_cpu=True)
    (path,) = tmp_path.rglob("precision.json")
    path.write_bytes(path.read_bytes().replace(b"bf16", b"fp32"))
    for named in ("auto", None, "fp32"):
        with pytest.raises(CorruptObject):
            resolve_precision(with_precision(plan, named), storage, on_cpu=True)


def test_measuring_leaves_the_random_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    state = torch.get_rng_state()
    assert speed_ups("cpu")["bf16"] > 0
    assert torch.get_rng_state().equal(state)


def test_a_gpu_without_other_precisions_is_not_measured(gpu: Gpu) -> None:
    gpu(False, (7, 5))
    assert speed_ups("cuda:0") == {}


def test_a_gpu_that_cannot_compute_in_the_chosen_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    monkeypatch.setattr(precision, "speed_ups", lambda _: {"bf16": 2.0})
    resolve_precision(plan, storage, on_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(PlanError, match="it trains in bf16, which the GPU here does not support"):
        resolve_precision(plan, storage, on_cpu=False)


@pytest.mark.parametrize(
    ("has_bf16", "capability", "expected"),
    [(True, (9, 0), "bf16"), (False, (8, 0), "tf32"), (False, (7, 5), "fp32"), (True, (7, 5), "bf16")],
)
def test_not_set_is_the_default_of_the_gpu(
    has_bf16: bool,
    capability: tuple[int, int],
    expected: str,
    gpu: Gpu,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Printed, recorded, and kept on every other machine that can compute in it."""
    gpu(has_bf16, capability)
    storage, plan = open_storage(str(tmp_path)), builders.plan()
    assert plan.config.training.precision is None
    with caplog.at_level(logging.INFO, "tercet"):
        assert resolved(plan, storage, on_cpu=False) == expected
    why = "training.precision is not set; this is the default on cuda:0"
    assert caplog.records[-1].getMessage() == f"precision: {expected} ({why})"
    kept = read_precision(storage, plan.run_id)
    assert kept is not None
    assert (kept.precision, kept.speed_up, kept.device) == (expected, None, "cuda:0")
    gpu(True, (9, 0))
    assert resolved(plan, storage, on_cpu=False) == expected
    if expected == "tf32":
        with pytest.raises(PlanError, match="it trains in tf32, which a CPU does not support"):
            resolved(plan, storage)
    else:
        assert resolved(plan, storage) == expected
    assert default_precision("cpu") == "fp32"


def test_a_run_that_began_without_a_record_stays_in_fp32(gpu: Gpu, tmp_path: Path) -> None:
    """It began on a CPU, or before tercet had another default for GPUs."""
    gpu(True, (9, 0))
    storage, plan = open_storage(str(tmp_path)), builders.plan()
    storage.put(layout.lease_key(plan.run_id), seal(attempted(plan.run_id)))
    assert resolved(plan, storage, on_cpu=False) == "fp32"
    assert resolved(plan, storage) == "fp32"


def test_a_run_is_not_resumed_in_another_precision_than_it_began_with(tmp_path: Path) -> None:
    """The recipe hash is the same: without a precision, as with fp32."""
    storage = open_storage(str(tmp_path))
    publish(storage, builders.manifest())
    sections: dict[str, Any] = {"storage": {"uri": str(tmp_path)}}
    unset, named = (builders.config(training={"precision": value}, **sections) for value in (None, "fp32"))
    assert unset != named
    assert unset.experiment_hash() == named.experiment_hash() == builders.config().experiment_hash()
    _, plan = survey(unset, "mine", builders.TODAY)
    storage.put(layout.plan_key("mine"), seal(plan))
    assert survey(named, "mine", builders.TODAY)[1].config.training.precision == "fp32"
    storage.put(layout.precision_key("mine"), seal(Precision(precision="bf16", device="cuda:0")))
    refused = "training.precision is fp32, but run mine began with bf16"
    with pytest.raises(PlanError, match=refused) as raised:
        survey(named, "mine", builders.TODAY)
    assert "omit training.precision" in raised.value.hint
    with pytest.raises(PlanError, match=refused):
        resolve_precision(plan.model_copy(update={"config": named}), storage, on_cpu=True)
    assert survey(unset, "mine", builders.TODAY)[1].config.training.precision is None


def test_the_precision_of_a_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    device, before = torch.device("cuda"), torch.backends.cuda.matmul.fp32_precision
    for name, autocast, products in (
        ("bf16", torch.bfloat16, before),
        ("fp16", torch.float16, before),
        ("tf32", None, "tf32"),
        ("fp32", None, "ieee"),
    ):
        with computing_in(name, device):
            assert torch.is_autocast_enabled("cuda") == (autocast is not None)
            assert autocast is None or torch.get_autocast_dtype("cuda") == autocast
            assert torch.backends.cuda.matmul.fp32_precision == products
            with computing_exactly(device):
                assert not torch.is_autocast_enabled("cuda")
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == before
        with computing_in(name, torch.device("cpu")):
            assert not torch.is_autocast_enabled("cpu")
            assert torch.backends.cuda.matmul.fp32_precision == before
