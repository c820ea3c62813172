"""Whether the workers get GPUs, and what the user reads about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tercet.cluster import devices
from tercet.cluster.devices import Devices, choose_devices
from tercet.cluster.session import with_devices
from tercet.config.examples import example_path
from tercet.config.recipe import load_config
from tercet.config.sections import WorkersConfig
from tercet.errors import PlanError

HEAD = "10.0.0.1:6379"


class Context:
    gcs_address = HEAD


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the autoscaler was asked. It answers no."""
    calls: list[Any] = []
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(devices, "can_have", lambda *question: bool(calls.append(question)))
    return calls


def choice(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, address: str = "", answer: bool | None = False, **workers: Any
) -> Devices:
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 8.0, **({"GPU": float(num_gpus)} if num_gpus else {})}
    )
    monkeypatch.setattr(devices, "can_have", lambda *_: answer)
    return choose_devices(WorkersConfig(**workers), address)


@pytest.mark.parametrize(
    ("num_gpus", "workers", "use_gpu", "reason"),
    [
        (0, {"num_workers": 1}, False, "this machine has no GPUs"),
        (1, {"num_workers": 1}, True, "this machine has 1 GPU for 1 worker"),
        (1, {"num_workers": 2}, False, "this machine has 1 GPU, and 2 workers need one each"),
        (4, {"num_workers": 2}, True, "this machine has 4 GPUs for 2 workers"),
        (2, {"min": 2, "max": 8}, True, "this machine has 2 GPUs for 2 workers"),
        (1, {"min": 2, "max": 8}, False, "this machine has 1 GPU, and 2 workers need one each"),
        (
            2,
            {"num_workers": 2, "use_gpu": True},
            True,
            "workers.use_gpu is true, and this machine has 2 GPUs for 2 workers",
        ),
        (2, {"num_workers": 2, "use_gpu": False}, False, "workers.use_gpu is false"),
    ],
)
def test_on_one_machine(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, workers: dict[str, Any], use_gpu: bool, reason: str
) -> None:
    assert choice(monkeypatch, num_gpus, answer=True, **workers) == Devices(use_gpu, reason)  # nobody is asked


@pytest.mark.parametrize(
    ("answer", "use_gpu", "reason"),
    [
        (True, True, "the Ray cluster has no GPUs, and 4 workers need one each; it can start the missing machines"),
        (False, False, "the Ray cluster has no GPUs, and 4 workers need one each"),
        (
            None,
            False,
            "the Ray cluster has no GPUs, and 4 workers need one each; whether it can start machines with GPUs is not "
            "known: if it can, set workers.use_gpu to true",
        ),
    ],
)
def test_on_a_cluster_that_may_grow(
    monkeypatch: pytest.MonkeyPatch, answer: bool | None, use_gpu: bool, reason: str
) -> None:
    assert choice(monkeypatch, 0, HEAD, answer, num_workers=4) == Devices(use_gpu, reason)


def test_the_autoscaler_is_asked_for_the_fewest_workers(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    choose_devices(WorkersConfig(min=2, max=8, cpus_per_worker=3), HEAD)
    assert asked == [(HEAD, 2, 3, 1)]
    choose_devices(WorkersConfig(num_workers=1), HEAD)  # is there
    choose_devices(WorkersConfig(num_workers=4, use_gpu=False), HEAD)
    assert len(asked) == 1


@pytest.mark.parametrize("address", ["", HEAD])
@pytest.mark.parametrize(
    ("num_gpus", "workers", "hint"),
    [
        (0, {"num_workers": 2}, "set workers.use_gpu to false to train on CPUs"),
        (1, {"num_workers": 2}, "lower workers.num_workers to 1, or set workers.use_gpu to false to train on CPUs"),
        (1, {"min": 2, "max": 4}, "lower workers.min to 1, or set workers.use_gpu to false to train on CPUs"),
    ],
)
def test_gpus_that_there_can_never_be(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, workers: dict[str, Any], hint: str, address: str
) -> None:
    with pytest.raises(PlanError, match=r"workers.use_gpu is true, but .* need one each") as caught:
        choice(monkeypatch, num_gpus, address, use_gpu=True, **workers)
    assert caught.value.hint == hint


@pytest.mark.parametrize("answer", [True, None])
def test_gpus_that_may_come_are_waited_for(monkeypatch: pytest.MonkeyPatch, answer: bool | None) -> None:
    chosen = choice(monkeypatch, 0, HEAD, answer, use_gpu=True, num_workers=2, start_timeout_seconds=77)
    assert chosen.use_gpu
    assert ("waits for them for 77 s at most" in chosen.reason) == (answer is None)


@pytest.fixture
def one_gpu() -> Iterator[None]:
    """Ray on this machine, which it takes for one with a single GPU."""
    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("one_gpu")
def test_the_demo_on_a_machine_with_one_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The choice is printed and recorded. Ray would wait for a second GPU for ten minutes, and fail."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tercet.cluster.session.logger.propagate", True)
    demo = load_config(example_path("demo"), [])
    assert (demo.workers.use_gpu, demo.workers.num_workers) == ("auto", 2)
    details: dict[str, Any] = {}
    decided = with_devices(demo, details.update)
    assert decided.workers.use_gpu is False
    reason = "this machine has 1 GPU, and 2 workers need one each"
    assert details == {"use_gpu": False, "reason": reason}
    lines = {record.getMessage() for record in caplog.records if record.name == "tercet"}
    assert lines == {f"the workers use CPUs: {reason}"}
    alone = demo.model_copy(update={"workers": demo.workers.model_copy(update={"num_workers": 1})})
    assert with_devices(alone).workers.use_gpu is True


@pytest.mark.parametrize(
    ("resources", "gib"),
    [
        ({"GPU": 2.0, "accelerator_type:H100": 1.0, "accelerator_type:A10G": 1.0}, 24),
        ({"GPU": 2.0, "accelerator_type:H100": 1.0, "accelerator_type:a card of tomorrow": 1.0}, None),
        ({"GPU": 2.0, "CPU": 8.0}, None),
    ],
)
def test_the_memory_of_the_smallest_gpu(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], gib: int | None
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert devices.gpu_bytes() == (None if gib is None else gib * 2**30)
