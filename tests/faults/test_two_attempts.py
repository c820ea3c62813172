"""Two attempts at one run: the second waits, then takes over from a dead one or reports which process runs."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from support.commands import check, run_command
from support.forks import Process
from support.interrupted_run import final_state, proof, settings
from support.workers import commits, held_worker, wait_until, worker_of, write_plan


def stop(process: Process, store: Path) -> None:
    """Stop a process while it does not hold the lock of the store, because all others would rightly wait for it."""
    with FileLock(store / ".tercet" / "lock", timeout=60, poll_interval=0.001):
        process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{process.pid}/task")
        wait_until(lambda: all(") T" in path.read_text() for path in threads.glob("*/stat")), process)


def test_a_frozen_attempt_is_taken_over_and_changes_nothing_when_it_wakes(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "cut-off", model, store, **settings(lease_seconds=3))
    go = tmp_path / "go"
    with held_worker(plan, environment, step=14, until=go) as cut_off:
        wait_until(lambda: any(commit.step == 12 for commit in commits(store, "cut-off")), cut_off)
        stop(cut_off, store)  # it renews nothing, and keeps everything in memory
        started = time.monotonic()
        second = check(run_command(worker_of(plan), environment, tmp_path))
        assert time.monotonic() - started > 3
        assert f"run cut-off is held: process {cut_off.pid} on" in second.stdout
        assert "resuming from the checkpoint of step 12" in second.stdout
        expected = final_state(store, whole[1])
        assert final_state(store, "cut-off") == expected
        go.touch()
        cut_off.send_signal(signal.SIGCONT)
        assert cut_off.wait(timeout=400) != 0
    assert "tercet: run cut-off was taken over by process" in plan.with_suffix(".log").read_text()
    assert final_state(store, "cut-off") == expected
    assert len(proof(store, tmp_path / "cut-off.yaml", "cut-off").attempts) == 2


@pytest.mark.soak  # waits for twice the lease; test_lease.py has it without a run
def test_the_second_of_two_attempts_names_the_first(
    whole: dict[int, str], model: Path, store: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "two", model, store, **settings(lease_seconds=30))
    go = tmp_path / "go"
    with held_worker(plan, environment, step=6, until=go) as first:
        wait_until(lambda: bool(commits(store, "two")), first)
        second = run_command(worker_of(plan), environment, tmp_path)
        assert second.returncode != 0
        assert f"tercet: run two is being trained: process {first.pid} on" in second.stdout
        go.touch()
        assert first.wait(timeout=400) == 0
    assert final_state(store, "two") == final_state(store, whole[1])
