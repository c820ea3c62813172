"""Packed, chunked and plain runs on two workers end with the same weights in every parallelism."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import check, run_command
from support.tiers import in_soak
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


IN_TEST = [("ddp", "packed", "ranking"), ("fsdp2", "packed", "cached"), ("zero3", "chunked", "ranking")]
REPORTS = {
    "packed": "forward pass: packed (one row of real tokens, no padding; a trial differs from padding by ",
    "chunked": "forward pass: chunked (as the recipe says; 4 chunks of similar lengths)",
    "plain": "forward pass: plain (as the recipe says)",
}


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> Callable[..., str]:
    """A function that returns what the run of a mode, a way and a loss printed; the first call runs it."""
    folder = tmp_path_factory.mktemp("packing")

    @functools.cache
    def output(mode: str, way: str, loss: str) -> str:
        plan = write_plan(
            folder,
            f"{mode}-{way}-{loss}",
            tiny_model_dir,
            store,
            loss=LOSSES[loss],
            training={"num_epochs": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.002},
            workers={"num_workers": 2, "parallelism": mode, "packing": way},
        )
        return check(run_command(worker_of(plan), environment, folder)).stdout

    return output


@pytest.mark.parametrize(("mode", "way", "loss"), [*IN_TEST, *in_soak(case for case in CASES if case not in IN_TEST)])
def test_every_way_ends_with_the_plain_weights(
    outputs: Callable[..., str], store: Path, mode: str, way: str, loss: str
) -> None:
    assert outputs("ddp", "plain", "ranking").count(REPORTS["plain"]) == 1
    assert outputs(mode, way, loss).count(REPORTS[way]) == 1
    exact, found = (final_weights(store, run) for run in ("ddp-plain-ranking", f"{mode}-{way}-{loss}"))
    assert largest_difference(exact, found) < 1e-5
    expected, measured = (commits(store, run)[0].metrics for run in ("ddp-plain-ranking", f"{mode}-{way}-{loss}"))
    assert measured == pytest.approx(expected, abs=1e-4)


def test_training_moves_the_weights(outputs: Callable[..., str], store: Path, tiny_model_dir: Path) -> None:
    """Otherwise comparing the weights would prove nothing."""
    outputs("ddp", "plain", "ranking")
    moved = largest_difference(weights(tiny_model_dir), final_weights(store, "ddp-plain-ranking"))
    assert moved > 1e-3
