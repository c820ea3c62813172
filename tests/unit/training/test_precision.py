"""`precision: auto` measures which precision is faster, once per run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from support import builders
from tercet.errors import CorruptObject, PlanError
from tercet.storage import open_storage
from tercet.training import arguments
from tercet.training.arguments import choose, resolve_precision, speed_up_of_bf16


@pytest.mark.parametrize(("speed_up", "expected"), [(0.0, "fp32"), (1.0, "fp32"), (1.19, "fp32"), (1.2, "bf16")])
def test_bf16_is_chosen_if_it_is_clearly_faster(speed_up: float, expected: str) -> None:
    assert choose("cpu", speed_up).precision == expected


def test_the_first_choice_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if the next machine measures something else."""
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    asked: list[str] = []
    for speed_up, expected in ((1.7, "bf16"), (0.5, "bf16")):
        monkeypatch.setattr(arguments, "speed_up_of_bf16", lambda device, value=speed_up: asked.append(device) or value)
        with caplog.at_level(logging.INFO, "tercet"):
            assert resolve_precision(plan, storage, on_cpu=True).config.training.precision == expected
        assert caplog.records[-1].getMessage() == "precision: bf16 (bf16 is 1.7 times as fast as fp32 on cpu)"
    assert asked == ["cpu"]


def test_the_first_of_two_concurrent_measurements_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})

    def measure(_: str) -> float:
        monkeypatch.setattr(arguments, "speed_up_of_bf16", lambda _: 0.5)
        assert resolve_precision(plan, storage, on_cpu=True).config.training.precision == "fp32"
        return 3.0

    monkeypatch.setattr(arguments, "speed_up_of_bf16", measure)
    assert resolve_precision(plan, storage, on_cpu=True).config.training.precision == "fp32"


def test_a_named_precision_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "speed_up_of_bf16", lambda _: pytest.fail("measured"))
    plan = builders.plan(training={"precision": "fp32"})
    assert resolve_precision(plan, open_storage(str(tmp_path)), on_cpu=True) is plan
    assert not list(tmp_path.rglob("*.json"))


def test_a_damaged_choice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "speed_up_of_bf16", lambda _: 2.0)
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    resolve_precision(plan, storage, on_cpu=True)
    (path,) = tmp_path.rglob("precision.json")
    path.write_bytes(path.read_bytes().replace(b"bf16", b"fp32"))
    with pytest.raises(CorruptObject):
        resolve_precision(plan, storage, on_cpu=True)


def test_measuring_leaves_the_random_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "SECONDS", 0.0)
    state = torch.get_rng_state()
    assert speed_up_of_bf16("cpu") > 0
    assert torch.get_rng_state().equal(state)


def test_a_gpu_that_cannot_compute_in_the_chosen_precision_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, plan = open_storage(str(tmp_path)), builders.plan(training={"precision": "auto"})
    monkeypatch.setattr(arguments, "speed_up_of_bf16", lambda _: 2.0)
    resolve_precision(plan, storage, on_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(PlanError, match="it trains in bf16, which the GPU here does not support"):
        resolve_precision(plan, storage, on_cpu=False)
