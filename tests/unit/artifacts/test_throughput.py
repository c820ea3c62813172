"""Throughputs add up over ranks and attempts, and are shown in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import builders
from support.checkpoints import RUN, Recording, lineage, trained
from tercet.artifacts.checkpoint import commit_step, read_commits, upload_part
from tercet.artifacts.throughput import Throughput, line_text, log_entry, of_all_ranks
from tercet.storage.layout import attempt_folder


def test_ranks_make_the_same_steps_together() -> None:
    total = of_all_ranks([builders.throughput(), builders.throughput(num_tokens=2000, peak_memory_bytes=1)])
    assert (total.num_steps, total.num_rows, total.num_tokens) == (10, 320, 3000)
    assert total.seconds["compute"] == 8.0
    assert total.peak_memory_bytes == 2_000_000_000
    assert total.peak_flops == 2 * builders.throughput().peak_flops
    assert total.share_of_peak == builders.throughput().share_of_peak


def test_attempts_follow_each_other() -> None:
    both = builders.throughput().then(builders.throughput(seconds={"compute": 2.0, "evaluation": 1.0}))
    assert (both.num_steps, both.num_tokens) == (20, 2000)
    assert both.seconds == {"compute": 10.0, "data": 1.0, "evaluation": 1.0, "ranks": 1.0, "storage": 2.5}
    assert both.since(builders.throughput()).seconds["compute"] == pytest.approx(2.0)
    assert both.since(builders.throughput()).num_tokens == 1000


def test_rates_exclude_evaluations_and_checkpoints() -> None:
    measured = builders.throughput(seconds={"compute": 8.0, "data": 2.0, "storage": 90.0, "evaluation": 900.0})
    assert measured.tokens_per_second == 100.0
    assert measured.share_of_time("storage") == 0.9
    assert Throughput().tokens_per_second == 0.0


def test_a_line_in_words() -> None:
    assert line_text(builders.throughput()) == (
        "16.0 rows/s  100 tokens/s  25 % of the peak of H100 SXM in bf16  "
        "waits: data 8.0 %, ranks 8.0 %, storage 20.0 %  memory 2.0 GB"
    )
    assert log_entry(builders.throughput())["waiting_for_storage"] == 0.2


def test_a_commit_has_the_throughput_of_all_ranks_and_attempts(tmp_path: Path) -> None:
    storage = Recording(tmp_path / "storage")
    folder = attempt_folder(RUN, 10, "a")
    for rank in range(2):
        files = {f"rng_state_{rank}.pth": b"x"}
        upload_part(storage, trained(tmp_path, files=files), folder, rank, builders.throughput())
    commit = commit_step(storage, RUN, 10, 1.0, {}, lineage("a", 2), wait_seconds=1, earlier=builders.throughput())
    assert commit.throughput is not None
    assert (commit.throughput.num_steps, commit.throughput.num_rows) == (20, 480)
    assert read_commits(storage, RUN)[0].throughput == commit.throughput
