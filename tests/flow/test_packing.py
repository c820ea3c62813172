"""Whole runs on two workers, packed, in chunks and plain: the same weights in every parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.commands import check, run_command
from support.workers import commits, final_weights, largest_difference, weights, worker_of, write_plan

MODES = ("ddp", "fsdp2", "zero2", "zero3")
LOSSES: dict[str, dict[str, Any]] = {
    "ranking": {"name": "MultipleNegativesRankingLoss"},
    "cached": {"name": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 3},
}
CASES = [
    *((mode, way, "ranking") for mode in MODES for way in ("packed", "chunked")),
    *((mode, "packed", "cached") for mode in MODES),
]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """The weights of each `<mode>-<way>-<loss>`, and what the workers printed."""
    folder = tmp_path_factory.mktemp("packing")
    plans: dict[bool, list[Path]] = {}
    for mode, way, loss in [("ddp", "plain", "ranking"), *CASES]:
        path = write_plan(
            folder,
            f"{mode}-{way}-{loss}",
            tiny_model_dir,
            store,
            loss=LOSSES[loss],
            training={"num_epochs": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.002},
            workers={"num_workers": 2, "parallelism": mode, "packing": way},
        )
        plans.setdefault(mode.startswith("zero"), []).append(path)
    # DeepSpeed leaves traces in a process.
    commands = [worker_of(*some) for some in plans.values()]
    output = [check(run_command(command, environment, folder)).stdout for command in commands]
    return {"store": store, "output": "".join(output)}


@pytest.mark.parametrize(("mode", "way", "loss"), CASES)
def test_every_way_ends_with_the_plain_weights(trained: dict[str, Any], mode: str, way: str, loss: str) -> None:
    store = trained["store"]
    exact, found = (final_weights(store, run) for run in ("ddp-plain-ranking", f"{mode}-{way}-{loss}"))
    assert largest_difference(exact, found) < 1e-5
    expected, measured = (commits(store, run)[0].metrics for run in ("ddp-plain-ranking", f"{mode}-{way}-{loss}"))
    assert measured == pytest.approx(expected, abs=1e-4)


def test_the_worker_says_how_it_runs(trained: dict[str, Any]) -> None:
    assert trained["output"].count("forward pass: packed (one row of real tokens, no padding)") == 8
    assert trained["output"].count("forward pass: chunked (as the recipe says; 4 chunks of similar lengths)") == 4
    assert trained["output"].count("forward pass: plain (as the recipe says)") == 1


def test_a_model_that_moved(trained: dict[str, Any], tiny_model_dir: Path) -> None:
    """Or the comparison would say nothing."""
    moved = largest_difference(weights(tiny_model_dir), final_weights(trained["store"], "ddp-plain-ranking"))
    assert moved > 1e-3
