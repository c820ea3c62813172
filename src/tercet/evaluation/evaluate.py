"""Metrics of a model on a frozen split.

Two evaluators of sentence-transformers: TripletEvaluator (is the positive nearer than the negative?) and
InformationRetrievalEvaluator (which place does the positive get among all positives of the dataset?). The first
saturates and compares with one text; the second keeps telling models apart.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.artifacts.checkpoint import Commit
from tercet.model.libraries import import_quietly
from tercet.planning.plan import TrainPlan
from tercet.planning.rows import load_splits
from tercet.storage import Storage, open_storage

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from tercet.evaluation.evaluators import SplitLoss

# Beyond this many texts the corpus is cut: encoding it would take longer than training. Positives of the split itself
# always stay in.
MAX_CORPUS_TEXTS = 100_000


def make_evaluator(splits: dict[str, Dataset], split: str, batch_size: int, loss: SplitLoss | None = None) -> Any:
    """Both evaluators for one split, and the loss on it where it is given. A query's relevant texts are all positives
    of its anchor in the whole dataset; a row with several negatives is as many triplets.

    Where there is a process group, every rank must call the result, and all of them get the same metrics."""
    from sentence_transformers.util import cos_sim

    from tercet.evaluation.evaluators import EncodeOnceEvaluator, RetrievalEvaluator, TripletsEvaluator

    rows = splits[split]
    corpus: dict[str, str] = {}
    positives_of: dict[str, set[str]] = {}
    for name in (split, *(other for other in sorted(splits) if other != split)):
        for anchor, positive in zip(splits[name]["anchor"], splits[name]["positive"], strict=True):
            if name != split and positive not in corpus and len(corpus) >= MAX_CORPUS_TEXTS:
                continue
            positives_of.setdefault(anchor, set()).add(corpus.setdefault(positive, f"text-{len(corpus)}"))
    queries = {f"query-{index}": anchor for index, anchor in enumerate(dict.fromkeys(rows["anchor"]))}
    evaluators: list[Any] = [
        RetrievalEvaluator(
            queries=queries,
            corpus={key: text for text, key in corpus.items()},
            relevant_docs={key: positives_of[anchor] for key, anchor in queries.items()},
            mrr_at_k=[10],
            ndcg_at_k=[10],
            accuracy_at_k=[1],
            precision_recall_at_k=[10],
            map_at_k=[10],
            batch_size=batch_size,
            write_csv=False,
            score_functions={"cosine": cos_sim},
        )
    ]
    negatives = [name for name in rows.column_names if name == "negative" or name.startswith("negative_")]
    if negatives:
        evaluators.append(
            TripletsEvaluator(
                anchors=list(rows["anchor"]) * len(negatives),
                positives=list(rows["positive"]) * len(negatives),
                negatives=[text for name in negatives for text in rows[name]],
                batch_size=batch_size,
                write_csv=False,
                similarity_fn_names=["cosine"],
            )
        )
    return EncodeOnceEvaluator([*evaluators, *([loss] if loss else [])])


def recipe_metrics(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Only the metrics that count, under the names that recipes use."""
    names = {
        "loss": "loss",
        "cosine_ndcg@10": "ndcg@10",
        "cosine_mrr@10": "mrr@10",
        "cosine_accuracy": "triplet_accuracy",
    }
    return {name: metrics[prefix + key] for key, name in names.items() if prefix + key in metrics}


def evaluate(model: SentenceTransformer, splits: dict[str, Dataset], split: str, batch_size: int) -> dict[str, float]:
    """Metrics of a model on one split. Raises NonFiniteError."""
    from tercet.evaluation.evaluators import require_finite

    return require_finite(recipe_metrics(make_evaluator(splits, split, batch_size)(model)), f"{split} split")


def evaluate_test(plan: TrainPlan, commit: Commit | None) -> dict[str, float]:
    """Metrics on the test split of the model that training starts from (commit None) or of a committed one.

    Meant for a process of its own, which has seen nothing of training: the model is what storage holds, verified."""
    import_quietly()
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    splits = load_splits(plan, storage)
    with tempfile.TemporaryDirectory(prefix="tercet-evaluate-") as folder:
        model = load_reloaded(plan, storage, commit or plan.starts_from, Path(folder))
        return evaluate(model, splits, "test", plan.config.evaluation.batch_size)


def load_reloaded(plan: TrainPlan, storage: Storage, commit: Commit | None, folder: Path) -> SentenceTransformer:
    """The recipe's base model (commit None), or a committed one, which is brought to `folder` and verified there."""
    from tercet.model.encoder import load_model, reloaded
    from tercet.model.packed_model import prepare

    config = plan.config.model
    model = load_model(reloaded(config, storage, commit, folder) if commit else config)
    prepare(model, plan.config.workers.packing)
    return model
