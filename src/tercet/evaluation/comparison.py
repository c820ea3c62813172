"""Two measured models, row by row: the gate's decision, and what a new model means for an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tercet.artifacts.decision import GateDecision, Origin
from tercet.config.sections import SliceConfig
from tercet.errors import CorruptObject
from tercet.evaluation.gate import decide
from tercet.evaluation.measurement import TEST, MeasuredModel, Measurement, groups_of
from tercet.evaluation.paired import Paired, slices_of
from tercet.planning.plan import TrainPlan
from tercet.storage.documents import Frozen

if TYPE_CHECKING:
    import pyarrow as pa

METRICS = {"queries": ("ndcg@10", "mrr@10"), "triplets": ("triplet_accuracy",)}
TEXTS = ("anchor", "positive", "negative")


def compare(plan: TrainPlan, reference: MeasuredModel, candidate: MeasuredModel) -> GateDecision:
    """Gate the candidate against the reference.

    Raises CorruptObject unless both were measured on the same rows and in the same precision."""
    config, role = plan.config.gate, reference.measurement.request.role
    if role.kind == "candidate":
        raise ValueError("a candidate is compared with the champion or the base model")
    precisions = [model.measurement.precision for model in (reference, candidate)]
    if len(set(precisions)) > 1:
        raise CorruptObject(
            f"the two models were measured in different precisions: {' and '.join(precisions)}",
            hint="delete the run's comparison/ and start again",
        )
    out_of_domain = {
        name: paired_results(name, reference, candidate, {})
        for name in sorted(candidate.measurement.request.out_of_domain)
    }
    return decide(
        paired_results(TEST, reference, candidate, config.slices),
        plan.metric,
        config,
        # A dataset of pairs has no triplet accuracy.
        out_of_domain={name: paired.get(plan.metric, paired["ndcg@10"]) for name, paired in out_of_domain.items()},
        origin=Origin(
            weights_sha256=weights_sha256(candidate.measurement),
            reference_weights_sha256=weights_sha256(reference.measurement),
            num_leaked_rows=candidate.measurement.num_leaked_rows,
            num_non_finite_weights=candidate.measurement.num_non_finite_weights,
        ),
        reference=role.kind,
    )


def paired_results(
    data: str, reference: MeasuredModel, candidate: MeasuredModel, rules: Mapping[str, SliceConfig]
) -> dict[str, Paired]:
    """Pair the results of both models on `data`, by metric. Raises CorruptObject if the rows differ."""
    results: dict[str, Paired] = {}
    for kind, metrics in METRICS.items():
        before, after = (model.table(data, kind) for model in (reference, candidate))
        if before is not None and after is not None:
            results.update({metric: pair(metric, before, after, rules) for metric in metrics})
    return results


def pair(metric: str, before: pa.Table, after: pa.Table, rules: Mapping[str, SliceConfig]) -> Paired:
    """Pair one metric of two tables of the same rows, the reference's and the candidate's.

    Each value of a label column (`slice_<name>`) is a slice, and so is each of `rules`. Raises CorruptObject if the
    tables have different rows."""
    texts = [name for name in TEXTS if name in before.column_names]
    if before.num_rows != after.num_rows or any(before[name] != after[name] for name in texts):
        raise CorruptObject(
            f"{metric}: the two models were measured on different rows",
            hint="delete the run's comparison/ and start again",
        )
    slices = {
        f"{name.removeprefix('slice_')}={label}": mask
        for name in before.column_names
        if name.startswith("slice_")
        for label, mask in slices_of(before[name].to_pylist()).items()
    }
    slices |= {
        name: np.array([rule.holds(text) for text in before[rule.column].to_pylist()], dtype=np.bool_)
        for name, rule in rules.items()
    }
    return Paired.of(metric, before[metric].to_numpy(), after[metric].to_numpy(), groups_of(before), slices)


def means(model: MeasuredModel) -> dict[str, float]:
    """Return a model's metrics on the test split."""
    tables = {kind: model.table(TEST, kind) for kind in METRICS}
    return {
        metric: float(np.mean(table[metric].to_numpy()))
        for kind, table in tables.items()
        if table is not None
        for metric in METRICS[kind]
    }


def weights_sha256(measurement: Measurement) -> str | None:
    """Return one hash of all weights; None for the base model, whose files tercet does not store."""
    commit = measurement.request.commit
    if commit is None:
        return None
    files = {path: record.sha256 for path, record in commit.model_files().items() if path.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


QUANTILES = (0.05, 0.5, 0.95)


class IndexImpact(Frozen):
    """What a new model changes for an index. Two models never share one: every row is embedded again."""

    num_queries: int
    overlap_at_10: float
    """Share of the reference's ten neighbours that are among the candidate's, averaged over queries."""
    num_queries_with_other_first: int
    """Queries whose nearest neighbour changes."""
    mean_score_shift: float
    """Mean change of the neighbours' similarity, candidate less reference. Move a threshold on scores by about that."""
    score_shift_quantiles: dict[float, float]
    """Quantiles of the change of each query's mean score."""
    num_rows: int
    embedding_seconds: float
    """Time to embed all rows of the index again, on as many machines as `seconds_per_row` was measured with."""


def impact(plan: TrainPlan, reference: MeasuredModel, candidate: MeasuredModel) -> IndexImpact:
    """Compute what the candidate changes for an index that was built with the reference."""
    before, after = reference.query_table(), candidate.query_table()
    return index_impact(
        reference_ids=np.array(before["neighbours"].to_pylist(), dtype=np.int64),
        candidate_ids=np.array(after["neighbours"].to_pylist(), dtype=np.int64),
        reference_scores=np.array(before["scores"].to_pylist(), dtype=np.float64),
        candidate_scores=np.array(after["scores"].to_pylist(), dtype=np.float64),
        num_rows=plan.config.nightly.index_rows or candidate.measurement.num_corpus_texts,
        seconds_per_row=candidate.measurement.seconds_per_text,
    )


def index_impact(
    reference_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    reference_scores: NDArray[np.float64],
    candidate_scores: NDArray[np.float64],
    num_rows: int,
    seconds_per_row: float,
) -> IndexImpact:
    """Compare the neighbours that two models find.

    ids, scores: each query's neighbours and their similarity, best first, all of shape (num_queries, 10). A negative
    id means no neighbour. Raises ValueError for other shapes, no queries, or an id twice in a row."""
    arrays = (reference_ids, candidate_ids, reference_scores, candidate_scores)
    if {array.shape for array in arrays} != {(len(reference_ids), 10)} or not len(reference_ids):
        raise ValueError(f"neighbours must be of shape (num_queries, 10), not {[array.shape for array in arrays]}")
    for ids in (reference_ids, candidate_ids):
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError("a query has the same neighbour twice")
    same = (reference_ids[:, :, None] == candidate_ids[:, None, :]) & (reference_ids >= 0)[:, :, None]
    num_neighbours = np.maximum((reference_ids >= 0).sum(axis=1), 1)
    before, after = (
        np.where(ids >= 0, scores, 0).sum(axis=1) / np.maximum((ids >= 0).sum(axis=1), 1)
        for ids, scores in ((reference_ids, reference_scores), (candidate_ids, candidate_scores))
    )
    return IndexImpact(
        num_queries=len(reference_ids),
        overlap_at_10=float((same.sum(axis=(1, 2)) / num_neighbours).mean()),
        num_queries_with_other_first=int((reference_ids[:, 0] != candidate_ids[:, 0]).sum()),
        mean_score_shift=float((after - before).mean()),
        score_shift_quantiles={q: float(np.quantile(after - before, q)) for q in QUANTILES},
        num_rows=num_rows,
        embedding_seconds=num_rows * seconds_per_row,
    )
