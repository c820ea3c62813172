"""Token ids are cached by one run and found by the next, and the weights are the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.commands import check, run_command
from support.workers import final_weights, largest_difference, worker_of, write_plan

FOUND = "token ids: all of the train rows are in this machine's cache"


def test_runs_with_and_without_cached_ids_end_equal(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    cache_dir = tmp_path / "cache"

    def plan(name: str, token_cache: Any) -> Path:
        workers = {"num_workers": 2, "token_cache": token_cache, "cache_dir": str(cache_dir), "packing": "packed"}
        training = {"num_epochs": 3, "learning_rate": 0.002}
        return write_plan(tmp_path, name, tiny_model_dir, store, workers=workers, training=training)

    def files() -> list[Path]:
        return sorted(cache_dir.glob("tokens/*/*"))

    first = check(run_command(worker_of(plan("ids-never", False), plan("ids-made", True)), environment, tmp_path))
    made = files()
    assert {path.suffix for path in made} == {".ids", ".lock"}
    assert FOUND not in first.stdout
    again = check(run_command(worker_of(plan("ids-found", "auto")), environment, tmp_path))
    assert again.stdout.count(FOUND) == 1
    assert files() == made
    never, *others = (final_weights(store, run) for run in ("ids-never", "ids-made", "ids-found"))
    assert [largest_difference(never, other) for other in others] == [0.0, 0.0]
