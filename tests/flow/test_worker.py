"""The worker without Ray: one seed gives equal bits, any number of workers the same model, a killed run resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support import tiny_model
from support.commands import PROGRAMS, check, run_command
from support.forks import Forked
from support.workers import (
    commits,
    final_weights,
    held_worker,
    largest_difference,
    model_folder,
    training_log,
    wait_until,
    weights,
    worker_of,
    write_plan,
)
from tercet.artifacts.throughput import Throughput

LOSSES: dict[str, dict[str, Any]] = {
    "ranking": {"name": "MultipleNegativesRankingLoss"},
    "triplet": {"name": "TripletLoss", "distance_metric": "cosine", "triplet_margin": 0.5},
}
# Runs whose names differ only in the number are one experiment on one and on two workers.
RUNS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1-ranking": (1, "ranking", {}),
    "1-triplet": (1, "triplet", {}),
    "1-plain": (1, "ranking", {}),
    "1-accumulated": (1, "ranking", {"gradient_accumulation_steps": 2}),
    "1-seed": (1, "ranking", {"seed": 7}),
    "1-damaged": (1, "ranking", {}),
    "1-auto": (1, "ranking", {"precision": "auto", "num_epochs": 1}),
    "2-ranking": (2, "ranking", {}),
    "2-triplet": (2, "triplet", {}),
    "2-accumulated": (2, "ranking", {"gradient_accumulation_steps": 2}),
}


TRAINED_ALIKE = ("1-ranking", "1-plain", "1-accumulated", "2-ranking", "2-accumulated")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, store: Path) -> dict[str, Path]:
    """The plan file of each run."""
    folder = tmp_path_factory.mktemp("plans")
    found = {}
    for run_id, (num_workers, loss, training) in {**RUNS, "2-again": RUNS["2-ranking"]}.items():
        workers = {"num_workers": num_workers, "packing": "plain" if run_id == "1-plain" else "auto"}
        sections = {"training": {"num_epochs": 2, **training}, "workers": workers}
        found[run_id] = write_plan(folder, run_id, tiny_model_dir, store, loss=LOSSES[loss], **sections)
    return found


@pytest.fixture(scope="module")
def trained(plans: dict[str, Path], store: Path, environment: dict[str, str]) -> Path:
    """The storage after all RUNS have finished."""
    for num_workers in (1, 2):
        several = [plans[run_id] for run_id in RUNS if RUNS[run_id][0] == num_workers]
        check(run_command(worker_of(*several), environment, store))
    return store


def test_one_seed_gives_equal_bits(plans: dict[str, Path], trained: Path, environment: dict[str, str]) -> None:
    check(run_command(worker_of(plans["2-again"]).command, environment, trained))
    assert largest_difference(final_weights(trained, "2-ranking"), final_weights(trained, "2-again")) == 0.0


def test_another_seed_gives_other_weights(trained: Path) -> None:
    assert largest_difference(final_weights(trained, "1-ranking"), final_weights(trained, "1-seed")) > 1e-3


def test_training_uses_the_measured_precision(trained: Path) -> None:
    found = json.loads((trained / "runs/1-auto/precision.json").read_text())
    assert found["precision"] == ("bf16" if found["speed_up"] >= 1.2 else "fp32")
    assert training_log(trained, "1-auto")["precision"] == found["precision"]
    assert training_log(trained, "1-ranking")["precision"] == "fp32"


@pytest.mark.parametrize("run_id", RUNS)
def test_the_times_of_the_meter_add_up_to_the_wall_clock(trained: Path, run_id: str) -> None:
    log = training_log(trained, run_id)
    measured = Throughput(**log["throughput"])
    wall = log["seconds"]["training"] + log["seconds"]["last_upload"]
    # The wall clock is that of rank 0, the seconds are the mean of the ranks, which do not start at the same moment.
    assert sum(measured.seconds.values()) == pytest.approx(wall, rel=0.02, abs=0.1 if log["world_size"] == 1 else 0.5)
    assert min(measured.seconds.values()) > 0


def test_every_run_counts_the_same_rows_and_tokens(trained: Path) -> None:
    """Whatever the number of workers, packing, and accumulation. A text is three words between [CLS] and [SEP]."""
    throughputs = [Throughput(**training_log(trained, run_id)["throughput"]) for run_id in TRAINED_ALIKE]
    assert {one.num_rows for one in throughputs} == {22 * 16}
    assert {one.num_tokens for one in throughputs} == {22 * 16 * 3 * 5}
    assert len({one.flops for one in throughputs}) == 1
    lines = [entry for entry in training_log(trained, "2-ranking")["log_history"] if "loss" in entry]
    assert all(line["tokens_per_second"] > 0 and line["share_of_peak"] > 0 for line in lines)
    assert all(0 <= line[f"waiting_for_{phase}"] < 1 for phase in ("data", "ranks", "storage") for line in lines)


@pytest.mark.parametrize("name", ["ranking", "triplet", "accumulated"])
def test_the_number_of_workers_does_not_change_the_weights(trained: Path, name: str) -> None:
    """Gradients are averaged, in-batch negatives cross ranks, and the global batches are the same."""
    assert largest_difference(final_weights(trained, f"1-{name}"), final_weights(trained, f"2-{name}")) < 2e-5
    logs = [training_log(trained, f"{num_workers}-{name}")["log_history"] for num_workers in (1, 2)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 22
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_the_number_of_workers_does_not_change_the_metrics(trained: Path, name: str) -> None:
    """Nor the loss on eval, because a row's negatives come from all ranks."""
    one, two = commits(trained, f"1-{name}"), commits(trained, f"2-{name}")
    for left, right in zip(one, two, strict=True):
        assert left.step == right.step
        assert right.metrics == pytest.approx(left.metrics, abs=1e-6)


def test_the_plain_trainer_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, tiny_model_dir: Path, environment: dict[str, str]
) -> None:
    """SentenceTransformerTrainer without tercet, with the same settings under its own names."""
    program = (PROGRAMS / "plain_trainer.py", tiny_model_dir, trained, tmp_path)
    check(run_command(Forked(tuple(map(str, program))), environment, tmp_path))
    assert largest_difference(weights(tmp_path / "ranking"), final_weights(trained, "1-plain")) < 1e-6
    # Packing changes the order of sums. The gradient of a key's bias is zero except for rounding, which Adam turns into
    # whole steps.
    for loss in LOSSES:
        assert largest_difference(weights(tmp_path / loss), final_weights(trained, f"1-{loss}")) < 2e-5, loss


def test_a_killed_worker_resumes_and_ends_with_the_same_bits(
    tmp_path: Path, store: Path, environment: dict[str, str]
) -> None:
    """With dropout, and during warm-up: the states of optimizer, schedule and random numbers are restored too."""
    model = tiny_model.tiny_bert(tmp_path / "dropout", tiny_model.all_texts(), dropout=0.1, pooler=False)
    settings: dict[str, Any] = {"training": {"num_epochs": 3, "warmup_ratio": 0.5, "log_every_steps": 1}}
    whole = write_plan(tmp_path, "whole", model, store, **settings)
    check(run_command(worker_of(whole), environment, tmp_path))

    killed = write_plan(tmp_path, "killed", model, store, **settings)
    with held_worker(killed, environment, step=13, until=tmp_path / "never") as process:
        wait_until(lambda: bool(commits(store, "killed")), process)
    assert [commit.step for commit in commits(store, "killed")] == [11]
    assert not (store / "runs/killed/training.json").exists()

    check(run_command(worker_of(killed), environment, tmp_path))
    assert training_log(store, "killed")["resumed_from_step"] == 11
    assert training_log(store, "whole")["resumed_from_step"] == 0
    counted = [Throughput(**training_log(store, run_id)["throughput"]) for run_id in ("whole", "killed")]
    assert counted[0].num_steps == counted[1].num_steps == 33  # each step once, in two attempts
    assert counted[0].num_tokens == counted[1].num_tokens
    assert [commit.step for commit in commits(store, "killed")] == [33, 22, 11]
    assert largest_difference(final_weights(store, "whole"), final_weights(store, "killed")) == 0.0
    assert commits(store, "killed")[0].metrics == commits(store, "whole")[0].metrics


def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    plans: dict[str, Path], trained: Path, environment: dict[str, str]
) -> None:
    path = model_folder(trained, commits(trained, "1-damaged")[0]) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = check(run_command(worker_of(plans["1-damaged"]), environment, trained))
    assert "step 22 is damaged and skipped" in done.stdout
    assert training_log(trained, "1-damaged")["resumed_from_step"] == 11


def test_a_checkpoint_holds_the_files_that_its_commit_lists(trained: Path) -> None:
    for commit in commits(trained, "2-ranking"):
        folder = model_folder(trained, commit)
        on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert on_disk - set(commit.files) == {"rank-0.json", "rank-1.json"}
        optimizers = {f"optimizer-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
        assert {*optimizers, "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(commit.files)
        assert "model.safetensors" in commit.model_files()
        assert not any(name.startswith(("optimizer", "rng_state", "trainer_state")) for name in commit.model_files())


def test_a_checkpoint_due_at_the_end_of_an_epoch_is_saved_once_with_metrics(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    """It is not saved before the evaluation and again after it, to the same folder."""
    sections: dict[str, Any] = {"training": {"num_epochs": 2}, "checkpoint": {"every_steps": 11}}
    plan = write_plan(tmp_path, "due", tiny_model_dir, store, **sections)
    done = check(run_command(worker_of(plan), environment, tmp_path))
    assert [(commit.step, "ndcg@10" in commit.metrics) for commit in commits(store, "due")] == [(22, True), (11, True)]
    assert done.stdout.count("checkpoint committed") == 2


def test_a_plan_for_more_workers_than_started_is_refused(
    tmp_path: Path, tiny_model_dir: Path, store: Path, environment: dict[str, str]
) -> None:
    plan = write_plan(tmp_path, "refused", tiny_model_dir, store, workers={"num_workers": 2})
    done = run_command([sys.executable, "-m", "tercet.cli", "worker", str(plan)], environment, tmp_path)
    assert done.returncode != 0
    assert "the plan is for 2 workers, but 1 were started" in done.stdout
    assert not (store / "runs/refused").exists()


def test_ranks_whose_models_diverge_are_stopped(environment: dict[str, str], tmp_path: Path) -> None:
    command = Forked((str(PROGRAMS / "ranks_differ.py"),), num_ranks=2)
    done = check(run_command(command, environment, tmp_path))
    for rank in (0, 1):
        assert f"rank {rank}: after 5 steps the ranks hold different weights" in done.stdout
