"""A plan in words: everything that is derived from a recipe, a line each."""

from __future__ import annotations

from tercet.memory import size_text
from tercet.plan import TrainPlan


def plan_text(plan: TrainPlan) -> str:
    """What `tercet plan` prints."""
    training, workers, rows = plan.config.training, plan.config.workers, plan.num_rows
    unknown = "not known before the model is on this machine"
    lines = {
        "run": plan.run_id,
        "data": f"{plan.config.dataset.name} {plan.dataset_version}: train {rows['train']:,}  eval {rows['eval']:,}  "
        f"test {rows['test']:,} rows; columns {', '.join(plan.columns)}",
        **({"mix": f"\n{'':13}".join(plan.shares)} if plan.shares else {}),
        "model": plan.config.model.name_or_path,
        "loss": plan.config.loss.name,
        "steps": f"{plan.num_steps:,} = {training.num_epochs} epochs × {plan.steps_per_epoch:,}; "  # noqa: RUF001
        f"warm-up {plan.warmup_steps:,}; {plan.num_dropped_rows:,} rows of each pass left out (they fill no batch)",
        "batch": f"{training.global_batch_size} = {workers.num_workers} workers × "  # noqa: RUF001
        f"{training.gradient_accumulation_steps} accumulation × {plan.rows_per_rank_and_micro_batch}",  # noqa: RUF001
        **({"workers": _workers(plan)} if workers.min is not None else {}),
        "evaluation": f"by {plan.metric} after steps {_steps(plan.evaluation_steps)}, "
        "each with a checkpoint but the first",
        "storage": _storage(plan) or unknown,
        "parallelism": f"{plan.parallelism}  ({plan.parallelism_reason})",
        "forward": plan.forward or unknown,
        "memory": unknown if plan.memory is None else plan.memory.text(),
        "time": "not known for a GPU"
        if plan.training_seconds is None
        else f"about {plan.training_seconds / 60:.1f} minutes of training on CPUs",
    }
    if plan.memory_warning is not None:
        lines["warning"] = plan.memory_warning
    return "\n".join(f"{name:<13}{value}" for name, value in lines.items())


def _steps(steps: tuple[int, ...]) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", shown[-1]])


def _workers(plan: TrainPlan) -> str:
    sizes = [str(size) for size in plan.world_sizes]
    several = " or ".join([", ".join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)
    return f"{several}: as many of these as there is room for; each shares the batch evenly"


def _storage(plan: TrainPlan) -> str | None:
    if plan.checkpoint_bytes is None or plan.stored_bytes is None:
        return None
    checkpoint = plan.config.checkpoint
    more = f", and one every {checkpoint.every_steps:,} steps" if checkpoint.every_steps else ""
    return (
        f"{size_text(plan.checkpoint_bytes)} a checkpoint{more}; the last {checkpoint.keep_last} and the best stay: "
        f"{size_text(plan.stored_bytes)} at most, in {plan.config.storage.uri}"
    )
