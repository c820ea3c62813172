"""README.md of a published model, in the format of the Hugging Face Hub: training data, metrics, recipe."""

from __future__ import annotations

from typing import Any

from tercet.artifacts.report import RunMetrics, losses
from tercet.planning.plan import TrainPlan

_METRIC_TYPES = {"ndcg@10": "ndcg_at_10", "mrr@10": "mrr_at_10", "triplet_accuracy": "cosine_accuracy"}


def model_card(plan: TrainPlan, metrics: RunMetrics, log_history: list[dict[str, Any]], recipe_yaml: str) -> str:
    """Return Markdown with YAML front matter, which includes the model-index; huggingface_hub writes that part."""
    from huggingface_hub import EvalResult, ModelCardData

    base = plan.config.model.name_or_path
    results = [
        EvalResult(
            task_type="triplet" if name == "triplet_accuracy" else "information-retrieval",
            task_name="Triplet" if name == "triplet_accuracy" else "Information Retrieval",
            dataset_type=plan.config.dataset.name,
            dataset_name=f"{plan.config.dataset.name} {split}",
            dataset_split=split,
            dataset_revision=plan.dataset_version,
            metric_type=_METRIC_TYPES[name],
            metric_name=name,
            metric_value=value,
        )
        for split, measured in (("eval", metrics.best_eval), ("test", metrics.best_test))
        for name, value in measured.items()
        if name in _METRIC_TYPES
    ]
    front = ModelCardData(
        model_name=plan.config.name,
        base_model=base if "/" in base and not base.startswith("/") else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", f"loss:{plan.config.loss.name}"],
        eval_results=results,
    )
    trust = ", trust_remote_code=True" if plan.config.model.trust_remote_code else ""
    return f"""---
{front.to_yaml()}
---

# {plan.config.name}

`{base}`, fine-tuned by tercet on {_trained_on(plan)}.
Run `{plan.run_id}`, step {metrics.best_step} of {plan.num_steps}, which has the best {plan.metric} on the eval split.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder"{trust})
embeddings = model.encode(["a text", "another text"])
```

## Results

The test split was used only once, at the end, with the model reloaded from storage.

| metric | split | baseline | this model |
|:--|:--|--:|--:|
{_result_rows(metrics)}

## Training log

| step | epoch | training loss | {" | ".join(_logged_names(metrics))} |
|--:|--:|--:|{"--:|" * len(_logged_names(metrics))}
{_log_rows(metrics, log_history)}

## Recipe

```yaml
{recipe_yaml.strip()}
```
"""


def _trained_on(plan: TrainPlan) -> str:
    """List each dataset with its version, and its weight if there are several or it is not 1."""
    several = len(plan.datasets) > 1
    parts = []
    for part in plan.datasets:
        weight = f", weight {part.weight:g}" if several or part.weight != 1 else ""
        parts.append(f"{part.num_train_rows:,} rows of `{part.name}` (version `{part.version}`{weight})")
    return ",\n".join(parts) + (
        f".\nThe eval and test splits are those of `{plan.datasets[0].name}`" if several else ""
    )


def _result_rows(metrics: RunMetrics) -> str:
    rows = []
    for split, before, after in (
        ("eval", metrics.baseline_eval, metrics.best_eval),
        ("test", metrics.baseline_test, metrics.best_test),
    ):
        rows += [f"| {name} | {split} | {before[name]:.4f} | {after[name]:.4f} |" for name in after if name in before]
    return "\n".join(rows)


def _logged_names(metrics: RunMetrics) -> list[str]:
    return [name for name in metrics.evaluations[0] if name not in ("step", "epoch")]


def _log_rows(metrics: RunMetrics, log_history: list[dict[str, Any]]) -> str:
    train, measured = dict(losses(log_history)), {int(entry["step"]): entry for entry in metrics.evaluations}
    epochs = {int(entry["step"]): float(entry.get("epoch", 0.0)) for entry in log_history if "step" in entry}
    rows = []
    for step in sorted({*train, *measured}):
        loss = f"{train[step]:.4f}" if step in train else "-"
        epoch = measured[step]["epoch"] if step in measured else epochs.get(step, 0.0)
        values = [f"{measured[step][n]:.4f}" if step in measured else "-" for n in _logged_names(metrics)]
        rows.append(f"| {step} | {epoch:.4f} | {loss} | {' | '.join(values)} |")
    return "\n".join(rows)
