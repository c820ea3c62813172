"""A forked worker is what a started one is, to those who look from outside."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.commands import PROGRAMS, run_command
from support.forks import Forked, ForkedProcess, start

PROGRAM = str(PROGRAMS / "shows_itself.py")


def seen(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("code", ["0", "3", "traceback"])
def test_it_has_its_own_folder_environment_and_exit_code(
    code: str, environment: dict[str, str], tmp_path: Path
) -> None:
    program = Forked((PROGRAM, code))
    there = {**environment, "MADE_UP": code}
    forked, started = (run_command(way, there, tmp_path) for way in (program, program.command))
    assert forked.returncode == started.returncode == (1 if code == "traceback" else int(code))
    assert seen(forked.stdout) == seen(started.stdout)
    assert seen(forked.stdout)[0]["cwd"] == str(tmp_path)
    assert ("ValueError: as asked" in forked.stdout) == (code == "traceback")


def test_sigkill_ends_it_alone(environment: dict[str, str], tmp_path: Path) -> None:
    waits = Forked((PROGRAM, "0", "waits"))
    with (tmp_path / "log").open("w") as out:
        first, second = (start(waits, {**environment, "RANK": "0"}, tmp_path, out) for _ in range(2))
        assert isinstance(first, ForkedProcess)
        first.kill()
        assert first.wait(timeout=60) == -signal.SIGKILL
        assert second.poll() is None
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=60) == -signal.SIGTERM


def test_when_a_rank_fails_the_others_end(environment: dict[str, str], tmp_path: Path) -> None:
    """A forked program behaves as under torchrun."""
    started = time.monotonic()
    done = run_command(Forked((PROGRAM, "3", "waits"), num_ranks=2), environment, tmp_path, timeout=120)
    assert done.returncode == 1
    assert {shown["RANK"] for shown in seen(done.stdout)} <= {"0", "1"}
    assert {shown["WORLD_SIZE"] for shown in seen(done.stdout)} == {"2"}
    assert time.monotonic() - started < 100
    assert run_command(Forked((PROGRAM, "0"), num_ranks=2), environment, tmp_path).returncode == 0
