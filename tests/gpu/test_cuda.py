"""Whole runs on a CUDA device: in every mode, the weights end close to those of a CPU run.

TERCET_GPU_TESTS_ON_CPU=1 runs the same tests on the CPU, in the modes that it has: a dry run of the tests themselves.
Ranks see the cards that they use and no others: with several, transformers would use DataParallel."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.commands import check, run_command
from support.tiny_model import all_texts, tiny_bert
from support.workers import (
    commits,
    final_weights,
    largest_difference,
    model_folder,
    training_log,
    worker_of,
    write_plan,
)
from tercet.failpoints import VARIABLE

ON_CPU = os.environ.get("TERCET_GPU_TESTS_ON_CPU") == "1"
NUM_GPUS = 0 if ON_CPU else torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not NUM_GPUS, reason="torch sees no CUDA device on this machine"),
]
needs_two = pytest.mark.skipif(not ON_CPU and NUM_GPUS < 2, reason="torch sees fewer than two CUDA devices")

MODES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
# Weights may differ from those of a run in fp32 on the CPU by this much. Numbers of 8 or 10 bits: every step may
# differ, but not by more than Adam's steps add up to.
MAX_DIFFERENCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 2e-2, "fp16": 2e-2}


class Lab(NamedTuple):
    """Where runs find what they need."""

    folder: Path
    model: Path
    store: Path
    environment: dict[str, str]

    def run(self, run_id: str, on_gpu: bool = True, num_gpus: int = 1, /, code: int = 0, **sections: Any) -> str:
        """Train one epoch, and return what was printed. sections: of the recipe."""
        path = write_plan(
            self.folder,
            run_id,
            self.model,
            self.store,
            **{
                **sections,
                "training": {"num_epochs": 1, "learning_rate": 0.0005, **sections.get("training", {})},
                "workers": {
                    "num_workers": num_gpus,
                    "use_gpu": on_gpu and not ON_CPU,
                    **sections.get("workers", {}),
                },
            },
        )
        visible = {} if ON_CPU else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(num_gpus)))}
        done = run_command(worker_of(path).command, {**self.environment, **visible}, self.folder, timeout=300)
        return check(done, code).stdout

    def armed(self, text: str) -> Lab:
        """The same, with a failpoint that fires once."""
        return self._replace(environment={**self.environment, VARIABLE: f"{text} once={self.folder / 'fired'}"})


@pytest.fixture
def lab(tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]) -> Lab:
    return Lab(tmp_path, tiny_model_dir, store, environment)


@pytest.fixture(scope="module")
def on_cpu(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The final weights of a CPU run."""
    folder = tmp_path_factory.mktemp("on_cpu")
    Lab(folder, tiny_model_dir, store, environment).run("cuda-test-cpu", False)
    return trained_weights(store, "cuda-test-cpu")


def trained_weights(store: Path, run_id: str) -> dict[str, torch.Tensor]:
    """Return the weights without the key's bias: its gradient is only rounding, which Adam turns into full steps."""
    return {name: value for name, value in final_weights(store, run_id).items() if not name.endswith("key.bias")}


def require(mode: str, precision: str) -> None:
    """Skip what this machine cannot do."""
    if mode.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if ON_CPU and (precision in ("tf32", "fp16") or mode == "zero3_offload"):
        pytest.skip("needs a GPU")
    if precision == "bf16" and not ON_CPU and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")


def check_log(store: Path, run_id: str, mode: str) -> dict[str, Any]:
    """Check that a run was on the device, in its mode, and that all of its numbers are finite."""
    log = training_log(store, run_id)
    assert log["device"].startswith("cpu" if ON_CPU else "cuda")
    assert log["parallelism"] == mode
    numbers = [value for entry in log["log_history"] for value in entry.values() if isinstance(value, int | float)]
    assert numbers
    assert all(math.isfinite(value) for value in numbers)
    return log


@pytest.mark.parametrize(
    ("mode", "precision"),
    [*((mode, precision) for mode in MODES for precision in ("fp32", "bf16")), ("ddp", "tf32"), ("ddp", "fp16")],
)
def test_one_worker(mode: str, precision: str, lab: Lab, on_cpu: dict[str, torch.Tensor]) -> None:
    require(mode, precision)
    run_id = f"cuda-test-{mode}-{precision}"
    lab.run(run_id, training={"precision": precision}, workers={"parallelism": mode})
    check_log(lab.store, run_id, mode)
    weights = trained_weights(lab.store, run_id)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert largest_difference(weights, on_cpu) < MAX_DIFFERENCE[precision]
    saved = SentenceTransformer(str(model_folder(lab.store, commits(lab.store, run_id)[0])), device="cpu")
    assert torch.isfinite(saved.encode(["one text"], convert_to_tensor=True)).all()


@pytest.mark.parametrize("fused", ["0", "1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout(precision: str, fused: str, lab: Lab) -> None:
    require("ddp", precision)
    model = tiny_bert(lab.folder / "dropout", all_texts(), dropout=0.1)
    own = lab._replace(model=model, environment={**lab.environment, "TERCET_FUSED_ATTENTION": fused})
    run_id = f"cuda-test-dropout-{precision}-{fused}"
    own.run(run_id, training={"precision": precision, "num_epochs": 2, "learning_rate": 0.005})
    log = check_log(lab.store, run_id, "ddp")
    losses = [entry["loss"] for entry in log["log_history"] if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_cached_loss(lab: Lab, on_cpu: dict[str, torch.Tensor]) -> None:
    """It is the loss of the other runs, computed with less memory."""
    lab.run("cuda-test-cached", loss={"name": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 4})
    check_log(lab.store, "cuda-test-cached", "ddp")
    assert largest_difference(trained_weights(lab.store, "cuda-test-cached"), on_cpu) < MAX_DIFFERENCE["bf16"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_that_is_killed_resumes(deterministic: bool, lab: Lab) -> None:
    settings = {
        "training": {"precision": "fp32", "deterministic": deterministic},
        "checkpoint": {"every_steps": 3, "keep_last": 100},
    }
    whole, killed = (f"cuda-test-{name}-{deterministic}" for name in ("whole", "killed"))
    lab.run(whole, **settings)
    # Not at a step: checkpoints are written beside the steps, which may be through before the first is.
    lab.armed("at=after_commit step=3 do=kill").run(killed, **settings, code=-9)
    assert commits(lab.store, killed)[0].step == 3
    lab.run(killed, **settings)
    off = largest_difference(trained_weights(lab.store, whole), trained_weights(lab.store, killed))
    assert off == 0.0 if deterministic or ON_CPU else off < MAX_DIFFERENCE["fp32"]


def test_evaluations_are_those_of_the_cpu(lab: Lab) -> None:
    lab.run("cuda-test-evaluated", training={"precision": "fp32"})
    lab.run("cuda-test-evaluated-cpu", False, training={"precision": "fp32"})
    at_start = [
        next(entry for entry in training_log(lab.store, run_id)["log_history"] if "eval_cosine_ndcg@10" in entry)
        for run_id in ("cuda-test-evaluated", "cuda-test-evaluated-cpu")
    ]
    for name in ("eval_cosine_ndcg@10", "eval_cosine_mrr@10", "eval_cosine_accuracy", "eval_loss"):
        assert at_start[0][name] == pytest.approx(at_start[1][name], abs=1e-3), name


@needs_two
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_workers(mode: str, lab: Lab, on_cpu: dict[str, torch.Tensor]) -> None:
    require(mode, "fp32")
    lab.run(f"cuda-test-two-{mode}", True, 2, training={"precision": "fp32"}, workers={"parallelism": mode})
    check_log(lab.store, f"cuda-test-two-{mode}", mode)
    assert largest_difference(trained_weights(lab.store, f"cuda-test-two-{mode}"), on_cpu) < MAX_DIFFERENCE["fp32"]


@needs_two
def test_two_workers_that_are_killed_go_on_as_one(lab: Lab) -> None:
    settings = {"training": {"precision": "fp32"}, "checkpoint": {"every_steps": 3, "keep_last": 100}}
    lab.run("cuda-test-elastic-whole", **settings)
    armed = lab.armed("at=after_commit step=3 do=kill")
    armed.run("cuda-test-elastic", True, 2, **settings, code=1)
    assert commits(lab.store, "cuda-test-elastic")[0].step == 3
    lab.run("cuda-test-elastic", **settings)
    off = largest_difference(
        trained_weights(lab.store, "cuda-test-elastic-whole"), trained_weights(lab.store, "cuda-test-elastic")
    )
    assert off < MAX_DIFFERENCE["fp32"]
