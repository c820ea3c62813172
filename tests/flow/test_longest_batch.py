"""The longest micro-batch is tried before the first step, and the run that follows has the same bits as without."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from support import tiny_model
from support.commands import check, run_command
from support.tiers import in_soak
from support.workers import commits, final_weights, largest_difference, model_folder, worker_of, write_plan
from tercet.failpoints import VARIABLE

TRIPLET = {"name": "TripletLoss", "distance_metric": "cosine", "triplet_margin": 0.5}
CACHED = {"name": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 3}
# By number of workers and by whether DeepSpeed, which changes global state, is used: the runs of one start.
RUNS: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "lone": (
        1,
        [
            ("ddp", {}),
            ("ddp-accumulated", {"training": {"gradient_accumulation_steps": 2}}),
            ("ddp-cached", {"loss": CACHED}),
            ("ddp-lora", {"model": {"lora": {"rank": 2, "dropout": 0.1}}}),
            ("ddp-checkpointing", {"training": {"gradient_checkpointing": True}}),
            (
                "ddp-matryoshka",
                {"loss": {"name": TRIPLET["name"], "matryoshka": {"dims": [48, 8], "dims_per_step": 1}}},
            ),
        ],
    ),
    "two": (2, [("ddp", {}), ("fsdp2", {}), ("fsdp2-cached", {"loss": CACHED})]),
    "deepspeed": (2, [("zero2", {}), ("zero2-cached", {"loss": CACHED}), ("zero3", {}), ("zero3_offload", {})]),
}
FITS = "the longest micro-batch fits: "


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.tiny_bert(
        tmp_path_factory.mktemp("longest") / "model", tiny_model.all_texts(), dense_features=48, dropout=0.1
    )


@pytest.mark.parametrize("start", ["lone", "two", *in_soak(["deepspeed"])])
def test_the_bits_of_a_run_are_those_of_one_without_a_trial(
    start: str, tmp_path: Path, dropout_model: Path, store: Path, environment: dict[str, str]
) -> None:
    num_workers, runs = RUNS[start]
    plans = []
    for name, sections in runs:
        for tries in (True, False):
            # Without warm-up: at a learning rate of 0, the trial would not move the weights.
            own = {"warmup_ratio": 0.0, "weight_decay": 0.1, **sections.get("training", {})}
            training = {"num_epochs": 1, "learning_rate": 0.002, "max_train_rows": 64, **own}
            workers = {"num_workers": num_workers, "parallelism": name.partition("-")[0], "try_longest_batch": tries}
            run_id = f"longest-{start}-{name}-{tries}"
            plan = write_plan(
                tmp_path, run_id, dropout_model, store, **{**sections, "training": training, "workers": workers}
            )
            plans.append(plan)
    output = check(run_command(worker_of(*plans), environment, tmp_path)).stdout
    assert output.count(FITS) == len(runs)
    for name, _ in runs:
        run_ids = [f"longest-{start}-{name}-{tries}" for tries in (True, False)]
        tried, plain = (final_weights(store, run_id) for run_id in run_ids)
        assert largest_difference(tried, plain) == 0.0, name
        optimizers = [
            {file.name: file.read_bytes() for file in model_folder(store, commits(store, run_id)[0]).glob("optimizer*")}
            for run_id in run_ids
        ]
        assert optimizers[0] == optimizers[1], name


def settings(num_workers: int = 1, steps: int | str = 1, **changes: Any) -> dict[str, Any]:
    """The sections of a run whose longest micro-batch is tried, with a loss that may be accumulated."""
    return {
        "loss": TRIPLET,
        "training": {"num_epochs": 1, "max_train_rows": 64, "gradient_accumulation_steps": steps},
        "workers": {"num_workers": num_workers, "try_longest_batch": True, **changes},
    }


def armed(tokens: int, rank: int | None = None) -> str:
    """A stand-in for the memory of a GPU: torch's error for a micro-batch of more tokens."""
    return f"at=longest_batch tokens={tokens}" + ("" if rank is None else f" rank={rank}")


def incidents(store: Path, run_id: str) -> list[str]:
    folder = store / "runs" / run_id / "incidents"
    return [json.loads(path.read_text())["kind"] for path in folder.iterdir()]


def test_a_batch_that_does_not_fit_ends_the_run_before_its_first_step(
    tmp_path: Path, dropout_model: Path, store: Path, environment: dict[str, str]
) -> None:
    plan = write_plan(tmp_path, "longest-refused", dropout_model, store, **settings())
    done = check(run_command(worker_of(plan), {**environment, VARIABLE: armed(100)}, tmp_path), code=2)
    assert "the longest micro-batch of this run, 16 rows with 2" in done.stdout
    assert "does not fit into the memory of rank 0: memory was in use when more was needed (a limit of 100 tokens" in (
        done.stdout
    )
    helps = "any of these helps: training.gradient_accumulation_steps: 2; training.gradient_checkpointing: true; "
    assert helps + "training.precision: bf16\n" in done.stdout
    assert incidents(store, "longest-refused") == ["out_of_memory"]
    assert commits(store, "longest-refused") == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_auto_takes_as_many_micro_batches_as_it_needs_and_keeps_them(
    num_workers: int, tmp_path: Path, dropout_model: Path, store: Path, environment: dict[str, str]
) -> None:
    runs = {f"longest-auto-{num_workers}-{steps}": steps for steps in ("auto", 4)}
    plans = [
        write_plan(tmp_path, run_id, dropout_model, store, **settings(num_workers, steps))
        for run_id, steps in runs.items()
    ]
    limit = armed(80 // num_workers)
    output = check(run_command(worker_of(plans[0]), {**environment, VARIABLE: limit}, tmp_path)).stdout
    assert output.count("starting again with 2 micro-batches a step") == 1
    assert output.count("starting again with 4 micro-batches a step") == 1
    assert f"{FITS}{4 // num_workers} rows, " in output
    auto, named = runs
    choice = json.loads((store / "runs" / auto / "accumulation.json").read_text())
    assert (choice["gradient_accumulation_steps"], choice["fits"]) == (4, True)
    # As if it had died after its first epoch: it keeps the number, and tries nothing.
    (store / "runs" / auto / "training.json").unlink()
    output = check(run_command(worker_of(*plans), environment, tmp_path)).stdout
    assert output.count(FITS) == 1
    assert largest_difference(final_weights(store, auto), final_weights(store, named)) == 0.0


def test_one_rank_alone_runs_out_of_memory(
    tmp_path: Path, dropout_model: Path, store: Path, environment: dict[str, str]
) -> None:
    plan = write_plan(tmp_path, "longest-one-rank", dropout_model, store, **settings(2))
    started = time.monotonic()
    limit = {VARIABLE: armed(50, rank=1)}
    done = run_command(worker_of(plan), {**environment, **limit}, tmp_path)
    assert done.returncode != 0
    # Both ranks stop, with the same error: rank 0 waited in a collective that rank 1 never entered.
    assert done.stdout.count("tercet: the longest micro-batch of this run, ") == 2
    assert done.stdout.count("does not fit into the memory of rank 1") == 2
    assert time.monotonic() - started < 60


def test_a_run_that_resumes_on_more_workers_tries_again_and_keeps_its_optimizer(
    tmp_path: Path, dropout_model: Path, store: Path, environment: dict[str, str]
) -> None:
    run_ids = [f"longest-resumed-{tries}" for tries in (True, False)]
    for run_id, tries in zip(run_ids, (True, False), strict=True):
        sections = settings(try_longest_batch=tries)
        sections["training"] |= {"num_epochs": 2, "warmup_ratio": 0.0}
        plan = write_plan(tmp_path, run_id, dropout_model, store, **sections)
        preempted = f"at=before_step step=6 do=notice once={tmp_path / run_id}"
        check(run_command(worker_of(plan), {**environment, VARIABLE: preempted}, tmp_path), code=6)
        sections["workers"]["num_workers"] = 2
        plan = write_plan(tmp_path, run_id, dropout_model, store, **sections)
        output = check(run_command(worker_of(plan), environment, tmp_path)).stdout
        assert "resuming from the checkpoint of step 6" in output
        assert (FITS in output) == tries
    assert largest_difference(*(final_weights(store, run_id) for run_id in run_ids)) == 0.0
