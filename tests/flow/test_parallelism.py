"""Each parallelism mode on two CPU workers ends with the same weights, saves complete models, and resumes."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer

from support import tiny_model
from support.commands import PROGRAMS, check, run_command
from support.tiers import in_soak
from support.workers import (
    commits,
    final_weights,
    largest_difference,
    model_folder,
    training_log,
    weights,
    worker_of,
    write_plan,
)
from tercet.artifacts.best import best_commit, publish_best
from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.lease import Holder
from tercet.storage import open_storage
from tercet.storage.documents import seal, unseal

DEEPSPEED = ("zero1", "zero2", "zero3", "zero3_offload")
OTHERS = ("ddp", "fsdp2")
MODES = (*OTHERS, *DEEPSPEED)
# One mode of each implementation. What the other modes add does not depend on Ray, adapters or recomputing.
KINDS = ("ddp", "fsdp2", "zero3")
LOSSES: dict[str, dict[str, Any]] = {
    "ranking": {"name": "MultipleNegativesRankingLoss"},
    "triplet": {"name": "TripletLoss", "distance_metric": "cosine", "triplet_margin": 0.5},
    "cached": {"name": "CachedMultipleNegativesRankingLoss", "mini_batch_size": 3},
    "matryoshka": {
        "name": "MultipleNegativesRankingLoss",
        "matryoshka": {"dims": [48, 24, 8], "dims_per_step": 2},
    },
}
# zero1 and zero3_offload treat a loss as zero2 and zero3 do, so they run with the first loss only.
CASES = [
    (mode, loss) for mode in MODES for loss in LOSSES if loss == "ranking" or mode not in ("zero1", "zero3_offload")
]
# Mode and number of workers of a run, and of the run that resumes it. The weights are compared with those of `ddp`.
RESUMES_AS = [
    ("ddp", 2, "zero3", 2),
    ("fsdp2", 2, "zero2", 1),
    ("zero2", 2, "fsdp2", 2),
    ("fsdp2", 2, "zero1", 2),
    ("zero3", 2, "ddp", 1),
    ("ddp", 1, "fsdp2", 2),
    ("zero1", 1, "zero3_offload", 2),
]


# `make test` runs these; `make soak` runs all.
IN_TEST = [("fsdp2", "ranking"), ("fsdp2", "cached"), ("zero3", "ranking"), ("zero3", "cached")]
PACKED_BF16 = "zero3-packed-bf16"
MORE_RESUMED = [f"{mode}-{what}" for mode, what in product(MODES, ["dropout", "bf16"])]
MORE_RESUMED.remove("fsdp2-dropout")


class Runs:
    """Tiny runs on two workers, made when a test first needs them, as many as possible in one start of the processes.

    DeepSpeed changes global state, so the other modes have processes of their own."""

    def __init__(self, folder: Path, store: Path, models: dict[str, Path], environment: dict[str, str]) -> None:
        self.folder, self.store, self.models, self.environment = folder, store, models, environment
        self._plans: dict[tuple[bool, int], list[Path]] = {}
        self._ended: set[str] = set()

    def need(self, *run_ids: str) -> Path:
        """Train the runs that have not run yet, and return their storage.

        Run ids: `<mode>-<loss>`, `<mode>-dropout`, `<mode>-bf16` (with dropout too), and PACKED_BF16."""
        for run_id in sorted({*run_ids} - self._ended):
            self._add_named(run_id, run_id)
        self.go()
        self._ended |= {*run_ids}
        return self.store

    def start_again(self, *run_ids: str) -> str:
        """Resume runs, as `<run_id>-again`, from the checkpoint after the first epoch. Return what they printed."""
        self.need(*run_ids)
        for run_id in run_ids:
            self.rewind(run_id, f"{run_id}-again", step=11)
            self._add_named(f"{run_id}-again", run_id)
        return self.go()

    def _add_named(self, run_id: str, as_run: str) -> None:
        mode, what = as_run.split("-", 1)
        if what in LOSSES:
            self.add(run_id, mode, self.models["plain"], loss=LOSSES[what])
        else:
            training = {"num_epochs": 3, "precision": "bf16" if "bf16" in what else "fp32"}
            workers = {"packing": "packed" if "packed" in what else "auto"}
            self.add(run_id, mode, self.models["dropout"], training=training, workers=workers)

    def add(self, run_id: str, mode: str, model: Path, num_workers: int = 2, /, **sections: Any) -> Path:
        """Plan a run; `go` starts it."""
        # The gradient of a key's bias is zero except for rounding, which Adam turns into steps of the learning rate.
        training = {"num_epochs": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.002}
        training |= sections.pop("training", {})
        workers = {"num_workers": num_workers, "parallelism": mode, **sections.pop("workers", {})}
        path = write_plan(self.folder, run_id, model, self.store, training=training, workers=workers, **sections)
        self._plans.setdefault((mode in DEEPSPEED, num_workers), []).append(path)
        return path

    def go(self) -> str:
        """Run everything that was added. Return what it printed."""
        output = ""
        for plans in self._plans.values():
            command = worker_of(*plans)
            output += check(run_command(command, self.environment, self.folder)).stdout
        self._plans.clear()
        return output

    def rewind(self, run_id: str, to: str, step: int) -> None:
        """Copy a finished run to the id `to`, as if it had died after the checkpoint of `step`."""
        target = self.store / "runs" / to
        shutil.copytree(self.store / "runs" / run_id, target)
        (target / "training.json").unlink()
        for folder in (target / "checkpoints").iterdir():
            if int(folder.name) > step:
                shutil.rmtree(folder)
            else:
                commit = unseal(Commit, (folder / "COMMIT").read_bytes(), str(folder))
                there = commit.model_copy(update={"folder": commit.folder.replace(f"runs/{run_id}/", f"runs/{to}/")})
                (folder / "COMMIT").write_bytes(seal(there))
        lease = unseal(Holder, (target / "LEASE.json").read_bytes(), str(target))
        (target / "LEASE.json").write_bytes(seal(lease.model_copy(update={"run_id": to})))


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    store: Path,
    tiny_model_dir: Path,
    dropout_model_dir: Path,
    environment: dict[str, str],
) -> Runs:
    models = {"plain": tiny_model_dir, "dropout": dropout_model_dir}
    return Runs(tmp_path_factory.mktemp("parallelism"), store, models, environment)


@pytest.fixture(scope="module")
def dropout_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, a pooler whose weights are drawn at loading, and a module without weights."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    options = {"dense_features": 48, "dropout": 0.1, "pooler": False, "normalize": True}
    return tiny_model.tiny_bert(folder, tiny_model.all_texts(), **options)


@pytest.mark.parametrize(
    ("mode", "loss"),
    [
        *IN_TEST,
        *in_soak(case for case in (*CASES, *product(MODES, ["dropout"])) if case[0] != "ddp" and case not in IN_TEST),
    ],
)
def test_every_mode_ends_with_the_weights_of_ddp(runs: Runs, mode: str, loss: str) -> None:
    """With an evaluation per epoch, a Dense module, two accumulation steps, and negatives across ranks. The worker
    itself checks the type of the wrapped model and its shards, and fails if they are wrong."""
    trained = runs.need(f"ddp-{loss}", f"{mode}-{loss}")
    assert training_log(trained, f"{mode}-{loss}")["parallelism"] == mode
    assert largest_difference(final_weights(trained, f"ddp-{loss}"), final_weights(trained, f"{mode}-{loss}")) < 1e-5
    expected, found = commits(trained, f"ddp-{loss}"), commits(trained, f"{mode}-{loss}")
    for left, right in zip(expected, found, strict=True):
        assert right.metrics == pytest.approx(left.metrics, abs=1e-4)
        assert largest_difference(_weights(trained, left), _weights(trained, right)) < 1e-5


def _weights(store: Path, commit: Any) -> dict[str, torch.Tensor]:
    return weights(model_folder(store, commit))


def test_gradient_caching_does_not_change_the_weights(runs: Runs) -> None:
    trained = runs.need("ddp-ranking", "ddp-cached")
    assert largest_difference(final_weights(trained, "ddp-ranking"), final_weights(trained, "ddp-cached")) < 1e-5


@pytest.mark.parametrize("mode", ["zero3", *in_soak(mode for mode in MODES if mode != "zero3")])
def test_the_published_model_is_the_best_one_and_complete(runs: Runs, mode: str) -> None:
    """It is the model of the best step, loads in plain sentence-transformers, and every tensor is whole."""
    trained = runs.need("ddp-dropout", f"{mode}-dropout")
    found = commits(trained, f"{mode}-dropout")
    best = best_commit(found, "ndcg@10")
    assert best is not None
    # The last one is made the worse one on paper: what counts is the committed metric, not the order.
    worse = [commit.model_copy(update={"metrics": {**commit.metrics, "ndcg@10": -commit.step}}) for commit in found]
    best = best_commit(worse, "ndcg@10")
    assert best is not None
    assert best.step == min(commit.step for commit in found)
    published = publish_best(open_storage(str(trained)), f"{mode}-dropout", best, "# A card")
    folder = trained / published.folder
    assert largest_difference(weights(folder), weights(model_folder(trained, best))) == 0.0
    assert largest_difference(weights(folder), final_weights(trained, f"{mode}-dropout")) > 1e-3
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).numel() > 0 for key in file.keys())  # noqa: SIM118 - not a dict
    model = SentenceTransformer(str(folder), device="cpu")
    reference = SentenceTransformer(str(model_folder(trained, _same_step(trained, best.step))), device="cpu")
    assert torch.allclose(
        model.encode("a text", convert_to_tensor=True), reference.encode("a text", convert_to_tensor=True), atol=1e-4
    )


def _same_step(store: Path, step: int) -> Any:
    return next(commit for commit in commits(store, "ddp-dropout") if commit.step == step)


@pytest.mark.parametrize("mode", [*KINDS, *in_soak(mode for mode in MODES if mode not in KINDS)])
def test_a_checkpoint_holds_the_share_of_every_rank(runs: Runs, mode: str) -> None:
    """Rank 0 saves the weights. Each rank saves its part of the optimizer's state, and its random state."""
    trained = runs.need(f"{mode}-ranking")
    for commit in commits(trained, f"{mode}-ranking"):
        documents = (model_folder(trained, commit) / f"rank-{rank}.json" for rank in (0, 1))
        parts = [json.loads(document.read_text())["files"].keys() for document in documents]
        of_rank = [
            {f"optimizer-0000{n}-of-00002.safetensors", f"ledger-0000{n}-of-00002.npy", f"rng_state_{n}.pth"}
            for n in (0, 1)
        ]
        assert of_rank[1] == parts[1] - parts[0]
        assert {*of_rank[0], "model.safetensors"} <= parts[0]
        sizes = [commit.files[f"optimizer-0000{rank}-of-00002.safetensors"].num_bytes for rank in (0, 1)]
        assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("names", [["fsdp2-dropout", PACKED_BF16], *in_soak([MORE_RESUMED])], ids=["two", "all others"])
def test_a_resumed_run_ends_with_the_same_bits(runs: Runs, names: list[str]) -> None:
    """In every mode, with dropout, in fp32 and in bf16, from the middle of the schedule. Once packed, because ZeRO-3
    gathered biases of bf16 runs in varying types, so that the first step after a start had different ones."""
    assert runs.start_again(*names).count("resuming from the checkpoint of step 11") == 2 * len(names)
    for name in names:
        assert largest_difference(final_weights(runs.store, name), final_weights(runs.store, f"{name}-again")) == 0.0
        assert commits(runs.store, f"{name}-again")[0].metrics == commits(runs.store, name)[0].metrics


@pytest.mark.parametrize("cases", [RESUMES_AS[:2], *in_soak([RESUMES_AS[2:]])], ids=["two", "all others"])
def test_a_run_resumes_in_another_mode_on_another_number_of_workers(
    runs: Runs, tiny_model_dir: Path, cases: list[tuple[str, int, str, int]]
) -> None:
    loss = LOSSES["ranking"]
    trained = runs.need("ddp-ranking", *(f"{before}-ranking" for before, num_before, *_ in cases if num_before == 2))
    for before, num_before, *_ in cases:
        if num_before == 1:
            runs.add(f"{before}-alone", before, tiny_model_dir, 1, loss=loss)
    runs.go()
    for before, num_before, after, num_after in cases:
        first = f"{before}-ranking" if num_before == 2 else f"{before}-alone"
        runs.rewind(first, f"{before}{num_before}-{after}{num_after}", step=11)
        runs.add(f"{before}{num_before}-{after}{num_after}", after, tiny_model_dir, num_after, loss=loss)
    output = runs.go()
    for before, num_before, after, num_after in cases:
        assert f"resuming from the checkpoint of step 11 ({num_before} workers)" in output
        run_id = f"{before}{num_before}-{after}{num_after}"
        assert training_log(trained, run_id)["resumed_from_step"] == 11
        difference = largest_difference(final_weights(trained, "ddp-ranking"), final_weights(trained, run_id))
        assert difference < 2e-5, run_id


@pytest.mark.parametrize("mode", ["ddp", *in_soak(mode for mode in MODES if mode != "ddp")])
def test_bf16_is_autocast_over_fp32_weights(runs: Runs, dropout_model_dir: Path, mode: str) -> None:
    """In training and in checkpoints. A weight that bf16 can represent exactly would have been rounded on the way."""
    trained = runs.need("ddp-dropout", f"{mode}-bf16")
    rough = final_weights(trained, f"{mode}-bf16")
    assert {value.dtype for value in rough.values()} == {torch.float32}
    # fp32 modes differ by 1e-6.
    assert 1e-4 < largest_difference(final_weights(trained, "ddp-dropout"), rough) < 0.1
    moved = {name: value for name, value in rough.items() if "pooler" not in name}  # the pooler is not trained
    before = weights(dropout_model_dir)
    assert [name for name, value in moved.items() if torch.equal(value, before[name])] == []
    assert [name for name, value in moved.items() if torch.equal(value, value.bfloat16().float())] == []


@pytest.mark.soak
def test_lora_and_gradient_checkpointing(runs: Runs, tiny_model_dir: Path, dropout_model_dir: Path) -> None:
    trained = runs.need("ddp-ranking", "ddp-dropout")
    adapter = {"lora": {"rank": 4, "target_modules": ["query", "value"]}}
    again = {"num_epochs": 3, "gradient_checkpointing": True}
    for mode in KINDS:
        runs.add(f"{mode}-lora", mode, tiny_model_dir, loss=LOSSES["ranking"], model=adapter)
        # With dropout, because the second forward pass must draw what the first one drew.
        runs.add(f"{mode}-recomputed", mode, dropout_model_dir, training=again)
    runs.go()
    exact = final_weights(trained, "ddp-ranking")
    for mode in KINDS:
        recomputed = final_weights(trained, f"{mode}-recomputed")
        assert largest_difference(final_weights(trained, "ddp-dropout"), recomputed) < 1e-5, mode
        lora = final_weights(trained, f"{mode}-lora")
        assert largest_difference(final_weights(trained, "ddp-lora"), lora) < 1e-5, mode
        folder = model_folder(trained, commits(trained, f"{mode}-lora")[0])
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        moved = {name for name in exact if not torch.equal(lora[name], weights(tiny_model_dir)[name])}
        assert {name.rsplit(".", 2)[-2] for name in moved} == {"query", "value", "2_Dense/linear"}, mode


@pytest.mark.soak
def test_a_resumed_lora_run_ends_with_the_same_bits(runs: Runs, tiny_model_dir: Path) -> None:
    """Resumes runs that the test before has trained."""
    trained = runs.store
    sections: dict[str, Any] = {"model": {"lora": {"rank": 4, "target_modules": ["query", "value"]}}}
    for mode in ("ddp", "zero3"):
        runs.rewind(f"{mode}-lora", f"{mode}-lora-again", step=11)
        runs.add(f"{mode}-lora-again", mode, tiny_model_dir, loss=LOSSES["ranking"], **sections)
    runs.go()
    for mode in ("ddp", "zero3"):
        again = final_weights(trained, f"{mode}-lora-again")
        assert largest_difference(final_weights(trained, f"{mode}-lora"), again) == 0.0, mode


@pytest.mark.soak
def test_a_run_on_ray_ends_with_the_same_bits(runs: Runs, tiny_model_dir: Path) -> None:
    trained = runs.need(*(f"{mode}-ranking" for mode in KINDS))
    plans = [runs.add(f"{mode}-ray", mode, tiny_model_dir, loss=LOSSES["ranking"]) for mode in KINDS]
    script = [sys.executable, str(PROGRAMS / "train_on_ray.py"), *map(str, plans)]
    check(run_command(script, runs.environment, runs.folder))
    for mode in KINDS:
        assert (
            largest_difference(final_weights(trained, f"{mode}-ranking"), final_weights(trained, f"{mode}-ray")) == 0.0
        )
