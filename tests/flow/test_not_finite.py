"""A non-finite number ends the run on all ranks. The error names it, and nothing of that step is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.commands import PROGRAMS, check, run_command
from support.forks import Forked
from support.tiers import in_soak
from support.workers import commits, write_plan
from tercet.failpoints import VARIABLE

STEP = 6
NAME = r"0.model.encoder.layer.1.output.dense.weight"
NORM = "the norm of all gradients together is inf"
MESSAGES = {
    ("ddp", "loss"): f"step {STEP}: the loss is nan",
    ("ddp", "gradient"): f"step {STEP}: the gradient of {NAME} is nan",
    ("ddp", "weight"): f"after step {STEP}: the weight {NAME} is nan",
    ("ddp", "embedding"): "evaluation at step 11: the embeddings of ",
    ("fsdp2", "gradient"): f"step {STEP}: the gradient of {NAME} is nan",
    ("fsdp2", "weight"): f"after step {STEP}: the weight {NAME} is nan",
    ("zero2", "gradient"): f"step {STEP}: {NORM}",
    ("zero3", "gradient"): f"step {STEP}: {NORM}",
    ("zero3", "weight"): f"after step {STEP}: the weight {NAME} is nan",
}


# `make test` has each mode once, and each kind once.
IN_SOAK = [("ddp", "gradient"), ("ddp", "weight"), ("fsdp2", "weight"), ("zero3", "gradient")]


@pytest.mark.parametrize(("mode", "kind"), [*(case for case in MESSAGES if case not in IN_SOAK), *in_soak(IN_SOAK)])
def test_a_non_finite_number_is_named_and_not_committed(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str], mode: str, kind: str
) -> None:
    run_id = f"not-finite-{mode}-{kind}"
    sections = {
        "training": {"num_epochs": 1, "log_every_steps": 100},
        "checkpoint": {"every_steps": 2},
        "workers": {"num_workers": 2, "parallelism": mode},
    }
    plan = write_plan(tmp_path, run_id, tiny_model_dir, store, **sections)
    step = 11 if kind == "embedding" else STEP
    script = str(PROGRAMS / "planted.py")
    first = store / "runs" / run_id / "checkpoints/00000002/COMMIT"
    armed = {VARIABLE: f"at=before_step step=5 do=hang once={tmp_path / 'held'} until={first}"}
    program = Forked((script, str(plan), kind, str(step)), num_ranks=2)
    done = check(run_command(program, {**environment, **armed}, tmp_path))
    for rank in (0, 1):
        assert f"rank {rank}: {MESSAGES[mode, kind]}" in done.stdout, done.stdout[-5000:]
    kept = [commit.step for commit in commits(store, run_id)]
    assert set(kept) <= set(range(2, step, 2))  # an upload may be under way when the run ends
    assert 2 in kept
    assert not (store / "runs" / run_id / "training.json").exists()
