"""The plan as text."""

from __future__ import annotations

import pytest

from support import builders
from tercet.cli.screens import plan_text
from tercet.planning.packing import Facts


def lines(**sections: object) -> dict[str, str]:
    """The lines of a plan, by the name that each begins with."""
    return {line[:13].strip(): line[13:] for line in plan_text(builders.plan(**sections)).splitlines()}


def test_every_line() -> None:
    found = lines()
    assert list(found) == [
        *("run", "data", "model", "loss", "steps", "batch", "evaluation", "storage", "devices", "parallelism"),
        *("precision", "forward", "memory", "time"),
    ]
    assert found["steps"] == "20 = 2 epochs \u00d7 10; warm-up 2; 5 rows of each pass excluded (they fill no batch)"
    assert found["evaluation"] == "by ndcg@10 after steps 0, 10, 20, each but the first with a checkpoint"


def test_a_last_batch_that_is_kept() -> None:
    kept = lines(training={"last_batch": "keep", "num_epochs": 1})["steps"]
    assert kept.startswith("11 = 1 epoch \u00d7 11; warm-up 2; no row of a pass excluded")


UNSET = "(not set; chosen when the run begins, and kept)"


@pytest.mark.parametrize(
    ("named", "use_gpu", "expected"),
    [
        ("bf16", "auto", "bf16"),
        ("auto", True, "the first worker measures which is fastest  (auto; the run keeps it)"),
        (None, False, "fp32  (not set; workers train on CPUs)"),
        (None, True, f"bf16 on a GPU that has it, else tf32 or fp32  {UNSET}"),
        (None, "auto", f"bf16 on a GPU that has it, else tf32 or fp32; fp32 on a CPU  {UNSET}"),
    ],
)
def test_the_precision(named: str | None, use_gpu: bool | str, expected: str) -> None:
    assert lines(training={"precision": named}, workers={"use_gpu": use_gpu})["precision"] == expected


def test_whose_memory_it_is() -> None:
    assert lines()["memory"].endswith(" a worker  (on CPUs)")
    assert lines(workers={"use_gpu": False})["memory"].endswith(" a worker")
    assert "CUDA 1.5 GiB" in lines(workers={"use_gpu": True})["memory"]


def test_a_limit_of_train_rows_is_shown() -> None:
    assert "rows" not in lines()
    rows = lines(training={"max_train_rows": 1280})["rows"]
    assert rows.endswith("train rows a pass; training.max_train_rows uses 1,280 of each dataset at most")


def test_what_stays_in_storage() -> None:
    """A checkpoint of 1,000 weights is 4 KB, and 8 KB of Adam's moments."""
    assert lines()["storage"].startswith("11.7 KiB a checkpoint; the last 2 and the best kept: 27.3 KiB at most")
    often = lines(checkpoint={"every_steps": 3, "keep_last": 3})["storage"]
    assert often.startswith("11.7 KiB a checkpoint, and one every 3 steps; the last 3 and the best kept: 62.5 KiB")
    assert (
        "27.3 KiB at most" in lines(checkpoint={"every_steps": 10})["storage"]
    )  # those at the end of an epoch are one


def test_many_evaluations_are_not_all_named() -> None:
    assert "after steps 0, 10, 20, \u2026, 90," in lines(training={"num_epochs": 9})["evaluation"]


def test_the_devices() -> None:
    choice = "or the cluster can start them, else CPUs; chosen when the run starts"
    assert lines(workers={"num_workers": 2})["devices"] == f"GPUs if there are 2 {choice}"
    assert lines(workers={"min": 1, "max": 2})["devices"] == f"GPUs if there are 1 {choice}"
    assert lines(workers={"use_gpu": True})["devices"] == "a GPU for each worker  (workers.use_gpu)"
    assert lines(workers={"use_gpu": False})["devices"] == "CPUs  (workers.use_gpu)"


def test_how_texts_share_a_forward_pass() -> None:
    assert lines()["forward"] == "unknown until the model is on this machine"
    facts = Facts("bert", own_code=False, is_cached=False)
    auto, chunked = (
        builders.plan_of(builders.config(workers={"packing": way}), builders.manifest(), packing=facts)
        for way in ("auto", "chunked")
    )
    assert "packed  (one row of real tokens, no padding, if the worker's trial on a small random copy of bert" in (
        plan_text(auto)
    )
    assert "chunked  (as the recipe says; 4 chunks of similar lengths)" in plan_text(chunked)
