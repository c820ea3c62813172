"""Ways to start tercet as a user would, and to check how it ended."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.forks import Forked, start

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(__file__).with_name("programs")
"""Programs that tests start as separate processes."""

# Variables of the shell that runs the tests: none of them may reach a run.
LEFT_OUT = ("AWS_", "RAY_", "TERCET_", "HF_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def run_command(
    command: list[str] | Forked, environment: Mapping[str, str], cwd: Path, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. A test that expects success calls `check`."""
    if isinstance(command, Forked):
        with tempfile.TemporaryFile("w+") as out:
            process = start(command, environment, cwd, out)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            out.seek(0)
            return subprocess.CompletedProcess(command.command, code, out.read())
    return subprocess.run(
        command,
        env=dict(environment),
        cwd=cwd,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def check(done: subprocess.CompletedProcess[str], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Fail with the output of the process unless it ended with `code`."""
    assert done.returncode == code, f"{done.args} ended with {done.returncode}, not {code}:\n{done.stdout[-6000:]}"
    return done


def tercet(*arguments: Any) -> list[str]:
    """A `tercet` command line for this Python."""
    return [sys.executable, "-m", "tercet.cli", *map(str, arguments)]
