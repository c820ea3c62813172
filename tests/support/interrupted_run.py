"""A tiny run with checkpoints within its epochs, and the state in which it must end whatever happened to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.workers import commits, make_plan, model_folder
from tercet.storage import open_storage
from tercet.training.ledger import RowsProof, verify_rows
from tercet.training.ledger import read as read_ledger

NUM_STEPS = 22
GLOBAL_BATCH_SIZE = 16  # of tiny_model's recipes
CHECKPOINTS = (4, 8, 11, 12, 16, 20, 22)  # epochs end after 11 and 22
# Each start writes other times, and another loss since the last line of the log. And when transformers loads a
# tokenizer that was in use, it writes to tokenizer_config.json the truncation that tokenizer.json has anyway.
NOT_COMPARED = {"trainer_state.json", "training_args.bin", "tokenizer_config.json"}


def settings(num_workers: int = 1, lease_seconds: float = 2) -> dict[str, Any]:
    """Return the sections of the recipe."""
    return {
        "training": {"num_epochs": 2, "warmup_ratio": 0.3, "gradient_accumulation_steps": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 2, "lease_seconds": lease_seconds},
        "workers": {"num_workers": num_workers},
    }


def final_state(store: Path, run_id: str) -> dict[str, Any]:
    """Return everything that two equal runs must have in common.

    The steps of all checkpoints; the files' hashes, the ledger and the metrics of the last one; and all evaluations."""
    committed = commits(store, run_id)
    last = committed[0]
    # Every step counts once, however many attempts made it.
    assert last.throughput is not None
    assert last.throughput.num_steps == last.step
    assert last.throughput.num_rows == last.step * GLOBAL_BATCH_SIZE
    ledger = [name for name in last.files if name.startswith("ledger-")]
    files = {name: last.files[name].sha256 for name in last.files.keys() - NOT_COMPARED - set(ledger)}
    assert {name.split("-")[0] for name in files} >= {"model.safetensors", "optimizer", "scheduler.pt"}
    run = store / "runs" / run_id
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {commit.step for commit in committed}
    return {
        "steps": [commit.step for commit in committed],
        "metrics": last.metrics,
        "files": files,
        "rows": read_ledger(model_folder(store, last)).tolist(),
        "evaluations": {path.name: path.read_text() for path in (run / "evaluations").iterdir()},
    }


def proof(store: Path, recipe: Path, run_id: str) -> RowsProof:
    """Return what `tercet runs verify` proves about a finished run. The proof must hold."""
    rows_proof = verify_rows(open_storage(str(store)), make_plan(recipe, run_id))
    assert rows_proof.holds, rows_proof.text()
    assert rows_proof.num_steps == NUM_STEPS
    return rows_proof
