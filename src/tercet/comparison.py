"""Two measured models, row by row → the gate's decision, and what a new model means for an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from tercet.errors import CorruptObject
from tercet.gate import decide
from tercet.gate_decision import GateDecision, Origin
from tercet.index_impact import IndexImpact, index_impact
from tercet.measured import TEST, Measured, groups_of, read_table
from tercet.night_sections import SliceConfig
from tercet.paired import Paired, slices_of
from tercet.plan import TrainPlan
from tercet.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

METRICS = {"queries": ("ndcg@10", "mrr@10"), "triplets": ("triplet_accuracy",)}
TEXTS = ("anchor", "positive", "negative")


def compare(
    storage: Storage,
    plan: TrainPlan,
    other: Measured,
    candidate: Measured,
    against: Literal["champion", "base model"],
) -> GateDecision:
    """Gate the candidate against `other`. Both must be measured on the same data. Raises CorruptObject otherwise."""
    config, run_id = plan.config.gate, plan.run_id
    results = paired_results(storage, run_id, TEST, other, candidate, config.slices)
    far = {
        name: paired_results(storage, run_id, name, other, candidate, {})
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
            other_weights_sha256=weights_sha256(other),
            num_leaked_rows=candidate.num_leaked_rows,
            num_non_finite_weights=candidate.num_non_finite_weights,
        ),
        against=against,
    )


def impact(storage: Storage, plan: TrainPlan, other: Measured, candidate: Measured) -> IndexImpact:
    """What it means for an index that was built with `other`."""
    before, after = (_table(storage, plan.run_id, measured, TEST, "queries") for measured in (other, candidate))
    return index_impact(
        champion_ids=np.array(before["neighbours"].to_pylist(), dtype=np.int64),
        candidate_ids=np.array(after["neighbours"].to_pylist(), dtype=np.int64),
        champion_scores=np.array(before["scores"].to_pylist(), dtype=np.float64),
        candidate_scores=np.array(after["scores"].to_pylist(), dtype=np.float64),
        num_rows=plan.config.nightly.index_rows or candidate.num_corpus_texts,
        seconds_per_row=candidate.seconds_per_text,
    )


def paired_results(
    storage: Storage, run_id: str, data: str, other: Measured, candidate: Measured, rules: Mapping[str, SliceConfig]
) -> dict[str, Paired]:
    """By metric, what the gate looks at. `other` is what `Paired` calls the champion."""
    found: dict[str, Paired] = {}
    for kind, metrics in METRICS.items():
        before, after = (read_table(storage, run_id, measured, data, kind) for measured in (other, candidate))
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


def means(storage: Storage, run_id: str, measured: Measured) -> dict[str, float]:
    """The metrics of a measured model on the test split."""
    tables = {kind: read_table(storage, run_id, measured, TEST, kind) for kind in METRICS}
    return {
        metric: float(np.mean(table[metric].to_numpy()))
        for kind, table in tables.items()
        if table is not None
        for metric in METRICS[kind]
    }


def weights_sha256(measured: Measured) -> str | None:
    """Of all weights together; None for a base model, whose files are not tercet's."""
    commit = measured.request.commit
    if commit is None:
        return None
    files = {path: record.sha256 for path, record in commit.model_files().items() if path.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _table(storage: Storage, run_id: str, measured: Measured, data: str, kind: str) -> pa.Table:
    table = read_table(storage, run_id, measured, data, kind)
    if table is None:
        raise CorruptObject(f"runs/{run_id}/comparison/{measured.request.who}: no {data}-{kind}", hint="start again")
    return table
