"""Ranks share one evaluation: it ends, the work is divided evenly, and all get the metrics of a single process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from support import tiny_model
from support.commands import PROGRAMS, check, run_command
from support.forks import Forked
from support.tiers import in_soak
from tercet.evaluation.evaluate import make_evaluator

SCRIPT = PROGRAMS / "evaluate_on_ranks.py"
BATCH_SIZE = 4  # as in the script
Case = dict[str, dict[str, list[str]]]


def _columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """Return columns with two negatives per row. Text lengths vary, so that rows are not sorted by length."""
    columns: dict[str, list[str]] = {name: [] for name in ("anchor", "positive", "negative_1", "negative_2")}
    for number, row in enumerate(rows):
        for name, texts in columns.items():
            text = row[name.split("_")[0]]
            texts.append(" ".join([text] * (1 + (number + len(name)) % 3)) + (" bo" if name == "negative_2" else ""))
    return columns


def _cases() -> dict[str, Case]:
    rows = tiny_model.triplets(60)
    return {
        "one_row": {"eval": _columns(rows[:1])},
        "two_rows": {"eval": _columns(rows[:2]), "train": _columns(rows[2:3])},
        "duplicates": {"eval": _columns(rows[:6] * 3), "train": _columns(rows[:9])},
        "indivisible": {"eval": _columns(rows[:29]), "train": _columns(rows[29:])},
    }


@dataclass
class Shared:
    """Results of the ranks of one torchrun, by rank."""

    results: list[dict[str, Any]]
    embeddings: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> dict[str, dict[str, float]]:
    """Metrics of each case, computed in this process."""
    model = SentenceTransformer(str(tiny_model_dir), device="cpu")
    return {
        name: make_evaluator({split: Dataset.from_dict(case[split]) for split in case}, "eval", BATCH_SIZE)(model)
        for name, case in _cases().items()
    }


def _run(mode: str, num_ranks: int, folder: Path, model: Path, environment: dict[str, str]) -> Shared:
    cases = folder / "cases.json"
    cases.write_text(json.dumps(_cases()))
    command = Forked((str(SCRIPT), str(model), str(cases), str(folder), mode), num_ranks)
    check(run_command(command, environment, folder))
    return Shared(
        [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)],
        [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)],
    )


def _num_texts(case: Case) -> list[int]:
    """Return the texts per call of encode: queries, corpus, and negatives that are not in the corpus."""
    corpus = {text for columns in case.values() for text in columns["positive"]}
    negatives = {*case["eval"]["negative_1"], *case["eval"]["negative_2"]} - corpus
    return [len(set(case["eval"]["anchor"])), len(corpus), len(negatives)]


@pytest.mark.parametrize(("mode", "num_ranks"), [*in_soak([("guarded", 2)]), ("guarded", 3), ("sharded", 2)])
def test_ranks_share_an_evaluation(
    mode: str,
    num_ranks: int,
    alone: dict[str, dict[str, float]],
    tiny_model_dir: Path,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    shared = _run(mode, num_ranks, tmp_path, tiny_model_dir, environment)
    model = SentenceTransformer(str(tiny_model_dir), device="cpu")
    for name, case in _cases().items():
        first, *others = [results[name] for results in shared.results]
        assert first["metrics"] == pytest.approx(alone[name], abs=1e-6), name
        # Equal metrics in every bit, and equally many texts in each pass.
        assert all(other == first for other in others), name
        passes = first["texts_per_pass"]
        if mode == "sharded":
            assert passes.pop(0) == 1, "the pass without inference mode"
        shares = [math.ceil(num_texts / num_ranks) for num_texts in _num_texts(case)]
        assert sum(passes) == sum(shares), name
        assert len(passes) == sum(math.ceil(share / BATCH_SIZE) for share in shares), name

        texts = [text for column in case["eval"].values() for text in column]
        wanted = model.encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(shared.embeddings[0][name], wanted, rtol=0, atol=1e-6)
        assert all(torch.equal(rank[name], shared.embeddings[0][name]) for rank in shared.embeddings), name
    if mode == "sharded":
        before, after = (shared.results[0][name]["metrics"] for name in ("indivisible", "trained"))
        assert shared.results[1]["trained"] == shared.results[0]["trained"]
        assert after.keys() == before.keys()


def test_without_sharing_rank_0_evaluates_alone(
    alone: dict[str, dict[str, float]], tiny_model_dir: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    shared = _run("served", 2, tmp_path, tiny_model_dir, environment)
    for name, metrics in alone.items():
        assert shared.results[0][name]["metrics"] == pytest.approx(metrics, abs=1e-6), name
        assert shared.results[1][name]["metrics"] == {}
