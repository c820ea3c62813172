"""Two measured models, row by row → the gate's decision, and what a new model means for an index."""

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
from tercet.evaluation.measurement import TEST, Measurement, groups_of, read_table
from tercet.evaluation.paired import Paired, slices_of
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.storage.documents import Frozen

if TYPE_CHECKING:
    import pyarrow as pa

METRICS = {"queries": ("ndcg@10", "mrr@10"), "triplets": ("triplet_accuracy",)}
TEXTS = ("anchor", "positive", "negative")


def compare(
    storage: Storage,
    plan: TrainPlan,
    reference: Measurement,
    candidate: Measurement,
) -> GateDecision:
    """Gate the candidate against the reference. Raises CorruptObject unless both were measured on the same rows."""
    config, run_id, kind = plan.config.gate, plan.run_id, reference.request.role.kind
    if kind == "candidate":
        raise ValueError("a candidate is compared with the champion or the base model")
    results = paired_results(storage, run_id, TEST, reference, candidate, config.slices)
    far = {
        name: paired_results(storage, run_id, name, reference, candidate, {})
        for name in sorted(candidate.request.out_of_domain)
    }
    return decide(
        results,
        plan.metric,
        config,
        # Pairs have no triplets to be right about.
        out_of_domain={name: found.get(plan.metric, found["ndcg@10"]) for name, found in far.items()},
        origin=Origin(
            weights_sha256=weights_sha256(candidate),
            reference_weights_sha256=weights_sha256(reference),
            num_leaked_rows=candidate.num_leaked_rows,
            num_non_finite_weights=candidate.num_non_finite_weights,
        ),
        reference=kind,
    )


def impact(storage: Storage, plan: TrainPlan, reference: Measurement, candidate: Measurement) -> IndexImpact:
    """What it means for an index that was built with the reference."""
    before, after = (_table(storage, plan.run_id, measured, TEST, "queries") for measured in (reference, candidate))
    return index_impact(
        reference_ids=np.array(before["neighbours"].to_pylist(), dtype=np.int64),
        candidate_ids=np.array(after["neighbours"].to_pylist(), dtype=np.int64),
        reference_scores=np.array(before["scores"].to_pylist(), dtype=np.float64),
        candidate_scores=np.array(after["scores"].to_pylist(), dtype=np.float64),
        num_rows=plan.config.nightly.index_rows or candidate.num_corpus_texts,
        seconds_per_row=candidate.seconds_per_text,
    )


def paired_results(
    storage: Storage,
    run_id: str,
    data: str,
    reference: Measurement,
    candidate: Measurement,
    rules: Mapping[str, SliceConfig],
) -> dict[str, Paired]:
    """By metric, what the gate looks at."""
    found: dict[str, Paired] = {}
    for kind, metrics in METRICS.items():
        before, after = (read_table(storage, run_id, measured, data, kind) for measured in (reference, candidate))
        if before is not None and after is not None:
            found.update({metric: pair(metric, before, after, rules) for metric in metrics})
    return found


def pair(metric: str, before: pa.Table, after: pa.Table, rules: Mapping[str, SliceConfig]) -> Paired:
    """One metric of two tables of the same rows. Rows of one group are of one `group`, or else of one anchor; slices
    are of the label columns (`slice_<name>`, each value one) and by rule."""
    texts = [name for name in TEXTS if name in before.column_names]
    if before.num_rows != after.num_rows or any(before[name] != after[name] for name in texts):
        raise CorruptObject(
            f"{metric}: the two models were measured on other rows", hint="delete the run's comparison/ and start again"
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


def means(storage: Storage, run_id: str, measured: Measurement) -> dict[str, float]:
    """The metrics of a measured model on the test split."""
    tables = {kind: read_table(storage, run_id, measured, TEST, kind) for kind in METRICS}
    return {
        metric: float(np.mean(table[metric].to_numpy()))
        for kind, table in tables.items()
        if table is not None
        for metric in METRICS[kind]
    }


def weights_sha256(measured: Measurement) -> str | None:
    """Of all weights together; None for a base model, whose files are not tercet's."""
    commit = measured.request.commit
    if commit is None:
        return None
    files = {path: record.sha256 for path, record in commit.model_files().items() if path.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _table(storage: Storage, run_id: str, measured: Measurement, data: str, kind: str) -> pa.Table:
    table = read_table(storage, run_id, measured, data, kind)
    if table is None:
        key = layout.row_results_key(run_id, measured.request.role.key, data, kind)
        raise CorruptObject(
            f"{storage.uri_of(key)} does not exist", hint="delete the run's comparison/ and start again"
        )
    return table


QUANTILES = (0.05, 0.5, 0.95)


class IndexImpact(Frozen):
    """Two models never share an index: every row is embedded again. This says how much changes for who searches."""

    num_queries: int
    overlap_at_10: float
    """Share of the reference's ten neighbours that are among the candidate's, on average over queries."""
    num_queries_with_other_first: int
    """Queries whose nearest neighbour is another."""
    mean_score_shift: float
    """Mean change of the neighbours' similarity, candidate less reference. Move a threshold on scores by about that."""
    score_shift_quantiles: dict[float, float]
    """Of the shift of each query's mean score."""
    num_rows: int
    embedding_seconds: float
    """To embed all rows of the index again, on as many machines as `seconds_per_row` was measured with."""


def index_impact(
    reference_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    reference_scores: NDArray[np.float64],
    candidate_scores: NDArray[np.float64],
    num_rows: int,
    seconds_per_row: float,
) -> IndexImpact:
    """Ids and similarity scores of each query's neighbours, best first, all of shape (num_queries, 10); negative ids
    stand for no neighbour. Raises ValueError for other shapes, no queries, or an id twice in a row."""
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
