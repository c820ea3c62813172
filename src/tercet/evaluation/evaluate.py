"""Metrics of a model on a frozen split.

Two evaluators of sentence-transformers: TripletEvaluator (is the positive nearer than the negative?) and
InformationRetrievalEvaluator (where does the positive rank among all positives of the dataset?). The first saturates,
as it compares with one text only; the second still separates good models.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.precision import read_precision
from tercet.errors import PlanError
from tercet.model.determinism import compute_deterministically
from tercet.model.libraries import import_quietly
from tercet.planning.packing import stored_choice
from tercet.planning.plan import TrainPlan
from tercet.planning.rows import load_splits
from tercet.storage import Storage, open_storage

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from tercet.evaluation.evaluators import SplitEvaluator, SplitLoss

# Encoding more texts than this would take longer than training. The split's own positives always stay in.
MAX_CORPUS_TEXTS = 100_000


class RetrievalTask(NamedTuple):
    """Queries, the texts to search, and the right answers."""

    queries: dict[str, str]
    """Each distinct anchor of the split, by query id, in the order of the rows."""
    corpus: dict[str, str]
    """Each distinct positive of the dataset, by text id; the split's own come first."""
    relevant_ids: dict[str, set[str]]
    """Text ids of all positives of the query's anchor in the whole dataset, by query id."""


def retrieval_task(splits: dict[str, Dataset], split: str) -> RetrievalTask:
    """Turn the rows of one split into a retrieval task over the positives of all `splits`.

    At most MAX_CORPUS_TEXTS texts, unless the split alone has more."""
    text_ids: dict[str, str] = {}
    ids_of_anchor: dict[str, set[str]] = {}
    for name in (split, *(other for other in sorted(splits) if other != split)):
        for anchor, positive in zip(splits[name]["anchor"], splits[name]["positive"], strict=True):
            if name != split and positive not in text_ids and len(text_ids) >= MAX_CORPUS_TEXTS:
                continue
            ids_of_anchor.setdefault(anchor, set()).add(text_ids.setdefault(positive, f"text-{len(text_ids)}"))
    queries = {f"query-{index}": anchor for index, anchor in enumerate(dict.fromkeys(splits[split]["anchor"]))}
    return RetrievalTask(
        queries=queries,
        corpus={text_id: text for text, text_id in text_ids.items()},
        relevant_ids={query_id: ids_of_anchor[anchor] for query_id, anchor in queries.items()},
    )


def make_evaluator(
    splits: dict[str, Dataset],
    split: str,
    batch_size: int,
    loss: SplitLoss | None = None,
    keep_hits: bool = False,
    precision: str = "fp32",
) -> SplitEvaluator:
    """Return the evaluator of one split: retrieval, triplets if the rows have negatives, and the loss if it is given.

    splits: all splits of the dataset, with the columns anchor and positive. The one that is evaluated may also have
    negatives (negative, or negative_1 and so on; a row with several of them is as many triplets). batch_size: texts
    encoded at a time. keep_hits: keep what each query found, for results row by row. precision: in which a GPU encodes.

    In a process group, every rank must call the evaluator, and every rank gets the same metrics."""
    from tercet.evaluation.encodings import Encodings
    from tercet.evaluation.evaluators import RetrievalEvaluator, SplitEvaluator, TripletsEvaluator

    rows, encodings = splits[split], Encodings(precision)
    negatives = [name for name in rows.column_names if name == "negative" or name.startswith("negative_")]
    retrieval = RetrievalEvaluator(encodings, *retrieval_task(splits, split), batch_size, keep_hits)
    triplets = TripletsEvaluator(encodings, rows, negatives, batch_size) if negatives else None
    return SplitEvaluator(encodings, retrieval, triplets, loss)


def recipe_metrics(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Select the metrics that a recipe can name, and give them the recipe's names."""
    names = {
        "loss": "loss",
        "cosine_ndcg@10": "ndcg@10",
        "cosine_mrr@10": "mrr@10",
        "cosine_accuracy": "triplet_accuracy",
    }
    return {name: metrics[prefix + key] for key, name in names.items() if prefix + key in metrics}


def evaluate(
    model: SentenceTransformer, splits: dict[str, Dataset], split: str, batch_size: int, precision: str = "fp32"
) -> dict[str, float]:
    """Return the metrics of a model on one split, by the recipe's names. Raises NonFiniteError."""
    from tercet.evaluation.evaluators import require_finite

    return require_finite(
        recipe_metrics(make_evaluator(splits, split, batch_size, precision=precision)(model)), f"{split} split"
    )


def evaluate_test(plan: TrainPlan, commit: Commit | None) -> dict[str, float]:
    """Return the test metrics of a committed model, or of the one that training starts from (commit None).

    Run it in a process of its own that has seen nothing of training: the model is loaded from storage and verified.
    Raises NonFiniteError, and CorruptObject for a damaged model."""
    import_quietly()
    compute_deterministically(plan.config.training.deterministic)
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    splits = load_splits(plan, storage)
    with tempfile.TemporaryDirectory(prefix="tercet-evaluate-") as folder:
        model = load_reloaded(plan, storage, commit or plan.starts_from, Path(folder))
        batch_size = plan.config.evaluation.batch_size
        return evaluate(model, splits, "test", batch_size, measuring_precision(plan, storage))


def measuring_precision(plan: TrainPlan, storage: Storage) -> str:
    """Return the precision in which fresh processes measure: on GPUs that of the run, on CPUs fp32.

    plan: with `workers.use_gpu` decided."""
    named = plan.config.training.precision
    if plan.config.workers.use_gpu is not True:
        return "fp32"
    if named not in (None, "auto"):
        return named
    kept = read_precision(storage, plan.run_id)
    return "fp32" if kept is None else kept.precision


def load_reloaded(plan: TrainPlan, storage: Storage, commit: Commit | None, folder: Path) -> SentenceTransformer:
    """Load the recipe's base model (commit None), or a committed one, which is downloaded to `folder` and verified.

    It computes on the GPU of this process, or on the CPU where the plan uses none. Raises PlanError if there is no such
    GPU."""
    from tercet.model.devices import own_device
    from tercet.model.encoder import load_model, reloaded
    from tercet.model.packing_trial import prepare_to_encode

    config, workers = plan.config.model, plan.config.workers
    device = own_device(workers)
    if workers.use_gpu is True and device == "cpu":
        raise PlanError(
            "workers.use_gpu is true, but the process that measures finds no GPU",
            hint="look for its driver with nvidia-smi, or set workers.use_gpu: false",
        )
    model = load_model(reloaded(config, storage, commit, folder) if commit else config, device)
    choice = stored_choice(storage, plan.run_id)
    prepare_to_encode(model, workers.packing if choice is None else choice)
    return model
