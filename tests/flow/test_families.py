"""Whole runs of further families, packed: they train, their saved models are complete, and test is measured on one."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from support.commands import check, run_command
from support.tiny_families import DECODERS, tiny_encoder
from support.tiny_model import all_texts
from support.workers import commits, model_folder, worker_of, write_plan
from tercet.evaluation.evaluate import evaluate_test
from tercet.planning.plan import TrainPlan

# Their files have another layout of weights than their modules, or they are decoders.
FAMILIES = ("gte", "nomic_bert", "jina_embeddings_v3", "qwen3", "embeddinggemma")


def test_runs_end_with_complete_models(tmp_path: Path, store: Path, environment: dict[str, str]) -> None:
    plans = []
    for family in FAMILIES:
        usual = ("lasttoken", "left") if family in DECODERS else ("mean", "right")
        model = tiny_encoder(tmp_path / family, family, all_texts(), usual[0], padding_side=usual[1])
        training = {"num_epochs": 1, "learning_rate": 0.002}
        plans.append(write_plan(tmp_path, f"family-{family}", model, store, training=training))
    output = check(run_command(worker_of(*plans), environment, tmp_path)).stdout
    way = "packed (one row of real tokens, no padding; a trial differs from padding by "
    assert output.count(f"forward pass: {way}") == len(FAMILIES)
    for family, path in zip(FAMILIES, plans, strict=True):
        (commit,) = commits(store, f"family-{family}")
        model = SentenceTransformer(str(model_folder(store, commit)), device="cpu")
        start = SentenceTransformer(str(tmp_path / family / "model"), device="cpu")
        assert abs(model.encode("bafa") - start.encode("bafa")).max() > 1e-4
        measured = evaluate_test(TrainPlan.model_validate_json(path.read_text()), commit)
        assert 0 <= measured["ndcg@10"] <= 1
