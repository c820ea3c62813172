"""Two attempts at one run: the second waits, takes over from a dead one, or says who runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.runs import proof, settings, what_counts
from flow.conftest import check, run_command
from flow.workers import commits, wait_until, worker_command, write_plan

SLOW = Path(__file__).parents[1] / "flow" / "slow_worker.py"


@contextmanager
def slow_worker(plan: Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that rests after each step of the second epoch; killed at the end if it still runs."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(SLOW), str(plan)], env=environment, cwd=plan.parent, stdout=file, stderr=file
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=20)


def test_one_that_was_cut_off_is_taken_over_and_changes_nothing_when_it_comes_back(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "cut-off", model, store, **settings(lease_seconds=3))
    log = tmp_path / "cut-off.log"
    with slow_worker(plan, environment, log) as cut_off:
        wait_until(lambda: any(commit.step == 12 for commit in commits(store, "cut-off")), cut_off)
        cut_off.send_signal(signal.SIGSTOP)  # no more renewals, and all that it holds stays in its memory
        started = time.monotonic()
        second = check(run_command(worker_command(plan), environment, tmp_path))
        assert time.monotonic() - started > 3
        assert f"run cut-off is held: process {cut_off.pid} on" in second.stdout
        assert "resuming from the checkpoint of step 12" in second.stdout
        expected = what_counts(store, whole[1])
        assert what_counts(store, "cut-off") == expected
        cut_off.send_signal(signal.SIGCONT)
        assert cut_off.wait(timeout=60) != 0
    assert "LeaseLost: run cut-off was taken over by process" in log.read_text()
    assert what_counts(store, "cut-off") == expected
    assert len(proof(store, tmp_path / "cut-off.yaml", "cut-off").attempts) == 2


def test_the_second_of_two_is_told_who_runs(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "two", model, store, **settings(lease_seconds=2))
    with slow_worker(plan, environment, tmp_path / "two.log") as first:
        wait_until(lambda: bool(commits(store, "two")), first)
        second = run_command(worker_command(plan), environment, tmp_path)
        assert second.returncode != 0
        assert f"RunIsTaken: run two is being trained: process {first.pid} on" in second.stdout
        assert first.wait(timeout=120) == 0
    assert what_counts(store, "two") == what_counts(store, whole[1])
