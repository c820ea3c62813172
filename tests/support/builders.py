"""A config, a manifest, a plan and a report, made by hand for tests that need no training."""

from __future__ import annotations

import datetime
from typing import Any

from tercet.artifacts.report import RunMetrics, RunReport
from tercet.artifacts.throughput import Throughput
from tercet.config.recipe import Config
from tercet.data.manifest import Manifest, Shard, SplitRule, TextStatistics, content_id
from tercet.planning.dataset_plan import FoundDataset
from tercet.planning.model_files import ModelFacts
from tercet.planning.plan import Findings, TrainPlan, make_plan, make_run_id

TODAY = datetime.date(2026, 3, 14)
FACTS = ModelFacts(num_parameters=1000, num_embedding_parameters=400, num_layers=2, hidden_size=16, max_seq_length=None)
LOG_HISTORY = [
    {"step": 1, "epoch": 0.1, "loss": 2.5},
    {"step": 10, "epoch": 1.0, "loss": 1.25},
    {"step": 10, "epoch": 1.0, "eval_loss": 1.5},
]


def config(**sections: Any) -> Config:
    """A whole recipe; each argument replaces keys of a section, or a value of the top level."""
    document: dict[str, Any] = {
        "name": "made",
        "dataset": {"name": "poems"},
        "model": {"name_or_path": "someone/model"},
        "loss": {"name": "MultipleNegativesRankingLoss"},
        "training": {"global_batch_size": 10, "num_epochs": 2},
    }
    for name, value in sections.items():
        replaces = name == "loss" or not isinstance(value, dict)
        document[name] = value if replaces else {**document.get(name, {}), **value}
    return Config.model_validate(document)


def manifest(
    train: int = 105,
    eval_: int = 20,
    test: int = 30,
    columns: tuple[str, ...] = ("anchor", "positive", "negative", "group"),
    dataset: str = "poems",
) -> Manifest:
    """A dataset version with these numbers of rows, named by its content as `publish` requires."""
    num_rows = {"train": train, "eval": eval_, "test": test}
    splits = {
        split: (Shard(path=f"shards/{split}-00000-of-00001.parquet", num_rows=n, num_bytes=n, sha256="0" * 64),)
        for split, n in num_rows.items()
        if n
    }
    rule = SplitRule(by="group", salt="salt", fractions=(0.8, 0.1, 0.1))
    return Manifest(
        dataset=dataset,
        version=content_id(columns, rule, splits),
        columns=columns,
        splits=splits,
        split_rule=rule,
        num_rows=num_rows,
        text_statistics={c: TextStatistics(mean_chars=40.0, max_chars=90) for c in columns if c != "group"},
        created_at=datetime.datetime(2026, 3, 14, tzinfo=datetime.UTC),
    )


def plan(**sections: Any) -> TrainPlan:
    """A plan of 20 steps in two epochs, evaluated after steps 0, 10 and 20. Each dataset of a `mix` has 50 train rows,
    which are pairs."""
    made = config(**sections)
    return plan_of(made, manifest(), *(mixed_manifest(part.name) for part in made.mix))


def plan_of(config: Config, *manifests: Manifest, **findings: Any) -> TrainPlan:
    """The plan of a recipe on these versions of its datasets; `findings` replace fields of Findings."""
    values: dict[str, Any] = {
        "run_id": make_run_id(config, [manifest.version for manifest in manifests], TODAY),
        "datasets": tuple(
            FoundDataset(part, manifest)
            for part, manifest in zip((config.dataset, *config.mix), manifests, strict=True)
        ),
        "model": FACTS,
    }
    return make_plan(config, Findings(**{**values, **findings}))


def mixed_manifest(dataset: str, train: int = 50) -> Manifest:
    """A version with pairs to train on, and nothing to measure."""
    return manifest(train, 0, 0, ("anchor", "positive"), dataset)


def metrics(before: float = 0.5, after: float = 0.75) -> RunMetrics:
    """Metrics of a run that is best after step 10. `before` and `after` are ndcg@10 on the test split."""
    evaluations = (
        {"step": 0, "epoch": 0.0, "loss": 2.0, "ndcg@10": 0.4},
        {"step": 10, "epoch": 1.0, "loss": 1.5, "ndcg@10": 0.7},
        {"step": 20, "epoch": 2.0, "loss": 1.4, "ndcg@10": 0.6},
    )
    return RunMetrics(
        baseline_eval={"loss": 2.0, "ndcg@10": 0.4},
        baseline_test={"ndcg@10": before},
        evaluations=evaluations,
        best_step=10,
        best_eval={"loss": 1.5, "ndcg@10": 0.7},
        best_test={"ndcg@10": after},
    )


def throughput(**changes: Any) -> Throughput:
    """Ten steps of one rank at a quarter of its peak."""
    values: dict[str, Any] = {
        "num_steps": 10,
        "num_rows": 160,
        "num_tokens": 1000,
        "flops": 1e12,
        "peak_flops": 4e12,
        "peak_source": "the peak of H100 SXM in bf16",
        "seconds": {"compute": 8.0, "data": 1.0, "ranks": 1.0, "storage": 2.5},
        "peak_memory_bytes": 2_000_000_000,
    }
    return Throughput(**{**values, **changes})


def report(**changes: Any) -> RunReport:
    """A finished run."""
    values: dict[str, Any] = {
        "run_id": "20260314-made-0a1b2c3d-4e5f6a7b",
        "status": "finished",
        "name": "made",
        "dataset": "poems",
        "dataset_version": "4e5f6a7b8c9d0e1f",
        "num_rows": {"train": 1105, "eval": 20, "test": 30},
        "num_workers": 2,
        "metric": "ndcg@10",
        "num_steps": 20,
        "metrics": metrics(),
        "seconds": {"train": 61.4, "test": 5.0},
        "run_uri": "/store/runs/r",
        "best_uri": "/store/runs/r/best",
    }
    return RunReport(**{**values, **changes})
