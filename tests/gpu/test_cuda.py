"""Whole runs of one worker on a CUDA device: in every mode, the weights end close to those of a CPU run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.commands import check, run_command
from support.workers import (
    commits,
    final_weights,
    largest_difference,
    model_folder,
    training_log,
    worker_of,
    write_plan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]

MODES = ("ddp", "zero2", "zero3")


def run(
    run_id: str,
    mode: str,
    precision: str,
    use_gpu: bool,
    folder: Path,
    model: Path,
    store: Path,
    environment: dict[str, str],
) -> dict[str, Any]:
    """Train one epoch and return the log. One device is visible: with several, transformers would use DataParallel."""
    path = write_plan(
        folder,
        run_id,
        model,
        store,
        training={"num_epochs": 1, "learning_rate": 0.0005, "precision": precision},
        workers={"num_workers": 1, "use_gpu": use_gpu, "parallelism": mode},
    )
    check(run_command(worker_of(path).command, {**environment, "CUDA_VISIBLE_DEVICES": "0"}, folder, timeout=300))
    return training_log(store, run_id)


def trained_weights(store: Path, run_id: str) -> dict[str, torch.Tensor]:
    """Return the weights without the key's bias: its gradient is only rounding, which Adam turns into full steps."""
    return {name: value for name, value in final_weights(store, run_id).items() if not name.endswith("key.bias")}


@pytest.fixture(scope="module")
def on_cpu(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The final weights of a CPU run."""
    folder = tmp_path_factory.mktemp("on_cpu")
    run("cuda-test-cpu", "ddp", "fp32", False, folder, tiny_model_dir, store, environment)
    return trained_weights(store, "cuda-test-cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_one_worker_on_cuda(
    mode: str,
    precision: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    store: Path,
    environment: dict[str, str],
    on_cpu: dict[str, torch.Tensor],
) -> None:
    run_id = f"cuda-test-{mode}-{precision}"
    log = run(run_id, mode, precision, True, tmp_path, tiny_model_dir, store, environment)
    assert log["device"].startswith("cuda")
    assert log["parallelism"] == mode
    numbers = [value for entry in log["log_history"] for value in entry.values() if isinstance(value, int | float)]
    assert numbers
    assert all(math.isfinite(value) for value in numbers)

    found = trained_weights(store, run_id)
    assert {value.dtype for value in found.values()} == {torch.float32}
    # bf16 computes with 8 bits of mantissa: every step may differ, but not by more than Adam's steps add up to.
    assert largest_difference(found, on_cpu) < (1e-3 if precision == "fp32" else 2e-2)

    saved = SentenceTransformer(str(model_folder(store, commits(store, run_id)[0])), device="cpu")
    assert torch.isfinite(saved.encode(["one text"], convert_to_tensor=True)).all()
