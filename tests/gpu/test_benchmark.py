"""A dry run of benchmarks/gpu.py on the CPU, so that it works on the day that there is a GPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from support.commands import check, run_command

REPOSITORY = Path(__file__).parents[2]


def test_every_section_runs_with_tiny_sizes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--skip", "tests", "--out", str(out)]
    check(run_command(command, {**os.environ}, REPOSITORY, timeout=300))
    rows = json.loads(out.read_text())
    steps = [row for row in rows if row["what"] == "step"]
    assert {row["way"] for row in steps} == {"plain", "tercet"}
    assert all(row["triplets_per_s"] > 0 for row in steps)
    assert not [row for row in rows if "failed" in row or "failed" in row["what"]]
