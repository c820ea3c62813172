"""Prometheus can read the throughput of each rank from the port of a Ray node."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from support.commands import PROGRAMS, check, run_command


@pytest.mark.soak
def test_the_port_of_a_node_serves_each_rank(tmp_path: Path, environment: dict[str, str]) -> None:
    quick = {**environment, "RAY_metrics_report_interval_ms": "300"}
    process = run_command([sys.executable, str(PROGRAMS / "metrics_on_ray.py")], quick, tmp_path)
    check(process)
    served = dict(re.findall(r"^ray_tercet_(\w+)\{.*rank=\"3\",run=\"a-run\".*\} (\S+)$", process.stdout, re.MULTILINE))
    assert {name: float(value) for name, value in served.items() if name in ("tokens_total", "steps_total")} == {
        "tokens_total": 2000.0,
        "steps_total": 20.0,
    }
    assert float(served["tokens_per_second"]) == 100.0
    assert float(served["compute_seconds_total"]) == 16.0
