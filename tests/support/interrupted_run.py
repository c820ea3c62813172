"""A tiny run with checkpoints amid its epochs, and what must be the same whatever happened to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.workers import commits, make_plan, model_folder
from tercet.storage import open_storage
from tercet.training.ledger import RowsProof, verify_rows
from tercet.training.ledger import read as read_ledger

NUM_STEPS = 22
CHECKPOINTS = (4, 8, 11, 12, 16, 20, 22)  # epochs end after 11 and 22
# What a start makes anew: times, and the loss since the last line of the log. And transformers, when it loads a
# tokenizer that was in use, writes into tokenizer_config.json the truncation that tokenizer.json has in any case.
NOT_COMPARED = {"trainer_state.json", "training_args.bin", "tokenizer_config.json"}


def settings(num_workers: int = 1, lease_seconds: float = 2) -> dict[str, Any]:
    """Sections of its recipe."""
    return {
        "training": {"num_epochs": 2, "warmup_ratio": 0.3, "gradient_accumulation_steps": 2},
        "checkpoint": {"every_steps": 4, "keep_last": 2, "lease_seconds": lease_seconds},
        "workers": {"num_workers": num_workers},
    }


def what_counts(store: Path, run_id: str) -> dict[str, Any]:
    """Of the last checkpoint: the hash of every file, the ledger of all ranks together, and the metrics; of every
    evaluation, the document; and the steps of all checkpoints in storage."""
    found = commits(store, run_id)
    last = found[0]
    ledger = [name for name in last.files if name.startswith("ledger-")]
    files = {name: last.files[name].sha256 for name in last.files.keys() - NOT_COMPARED - set(ledger)}
    assert {name.split("-")[0] for name in files} >= {"model.safetensors", "optimizer", "scheduler.pt"}
    run = store / "runs" / run_id
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {commit.step for commit in found}
    return {
        "steps": [commit.step for commit in found],
        "metrics": last.metrics,
        "files": files,
        "rows": read_ledger(model_folder(store, last)).tolist(),
        "evaluations": {path.name: path.read_text() for path in (run / "evaluations").iterdir()},
    }


def proof(store: Path, recipe: Path, run_id: str) -> RowsProof:
    """What `tercet runs verify` finds of a run that ended."""
    found = verify_rows(open_storage(str(store)), make_plan(recipe, run_id))
    assert found.holds, found.text()
    assert found.num_steps == NUM_STEPS
    return found
