"""Plans and reports as text for the screen."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tercet.artifacts.report import Metrics, RunReport, verdict
from tercet.artifacts.throughput import peak_text, rates_text, waits_text
from tercet.config.recipe import Config
from tercet.planning.estimates import size_text
from tercet.planning.plan import TrainPlan
from tercet.storage.layout import REPORT_PAGE


def plan_text(plan: TrainPlan) -> str:
    """The plan as `tercet plan` prints it: one line for each fact, its name first."""
    training, workers, rows = plan.config.training, plan.config.workers, plan.num_rows
    unknown = "unknown until the model is on this machine"
    lines = {
        "run": plan.run_id,
        "data": f"{plan.config.dataset.name} {plan.dataset_version}: train {rows['train']:,}  eval {rows['eval']:,}  "
        f"test {rows['test']:,} rows; columns {', '.join(plan.columns)}",
        **({"mix": f"\n{'':13}".join(plan.shares)} if plan.shares else {}),
        **({"rows": _rows(plan)} if training.max_train_rows is not None else {}),
        "model": plan.config.model.name_or_path,
        "loss": plan.config.loss.name,
        "steps": f"{plan.num_steps:,} = {_of(training.num_epochs, 'epoch')} × {plan.steps_per_epoch:,}; "  # noqa: RUF001
        f"warm-up {plan.warmup_steps:,}; {_last_batch(plan)}",
        "batch": f"{training.global_batch_size} = {_of(workers.num_workers, 'worker')} × "  # noqa: RUF001
        f"{training.num_micro_batches} accumulation × {plan.rows_per_rank_and_micro_batch}"  # noqa: RUF001
        + (_AUTO if training.gradient_accumulation_steps == "auto" else ""),
        **({"workers": _workers(plan)} if workers.min is not None else {}),
        "evaluation": f"by {plan.metric} after steps {_steps(plan.evaluation_steps)}, "
        "each but the first with a checkpoint",
        "storage": _storage(plan) or unknown,
        "devices": _devices(plan),
        "parallelism": f"{plan.parallelism}  ({plan.parallelism_reason})",
        "precision": _precision(plan.config),
        "forward": plan.forward or unknown,
        "memory": _memory(plan) or unknown,
        "time": "unknown for a GPU"
        if plan.training_seconds is None
        else f"about {plan.training_seconds / 60:.1f} minutes of training on CPUs",
    }
    if plan.memory_warning is not None:
        lines["warning"] = plan.memory_warning
    return "\n".join(f"{name:<13}{value}" for name, value in lines.items())


def _precision(config: Config) -> str:
    named, use_gpu = config.training.precision, config.workers.use_gpu
    on_gpu = "bf16 on a GPU that has it, else tf32 or fp32"
    if named is None and use_gpu is False:
        return "fp32  (not set; workers train on CPUs)"
    if named is None:
        where = on_gpu if use_gpu is True else f"{on_gpu}; fp32 on a CPU"
        return f"{where}  (not set; chosen when the run begins, and kept)"
    return "the first worker measures which is fastest  (auto; the run keeps it)" if named == "auto" else named


_AUTO = "; more accumulation if the longest micro-batch does not fit into a GPU, decided before the first step"


def _rows(plan: TrainPlan) -> str:
    limit = plan.config.training.max_train_rows
    return f"{plan.num_train_rows:,} train rows a pass; training.max_train_rows uses {limit:,} of each dataset at most"


def _of(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _last_batch(plan: TrainPlan) -> str:
    if plan.config.training.last_batch == "keep":
        return "no row of a pass excluded; what does not fill a last batch is a smaller one"
    return f"{_of(plan.num_dropped_rows, 'row')} of each pass excluded (they fill no batch)"


def _steps(steps: tuple[int, ...]) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", shown[-1]])


def _workers(plan: TrainPlan) -> str:
    sizes = [str(size) for size in plan.world_sizes]
    several = " or ".join([", ".join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)
    return f"{several}: as many as there is room for; each number shares the batch evenly"


def _devices(plan: TrainPlan) -> str:
    workers = plan.config.workers
    if workers.use_gpu != "auto":
        return f"{'a GPU for each worker' if workers.use_gpu else 'CPUs'}  (workers.use_gpu)"
    needed = workers.min or workers.num_workers
    return f"GPUs if there are {needed} or the cluster can start them, else CPUs; chosen when the run starts"


def _memory(plan: TrainPlan) -> str | None:
    if plan.memory is None:
        return None
    may_use_gpus = plan.config.workers.use_gpu == "auto" and not plan.memory.overhead_bytes
    return plan.memory.text() + ("  (on CPUs)" if may_use_gpus else "")


def _storage(plan: TrainPlan) -> str | None:
    if plan.checkpoint_bytes is None or plan.stored_bytes is None:
        return None
    checkpoint = plan.config.checkpoint
    more = f", and one every {checkpoint.every_steps:,} steps" if checkpoint.every_steps else ""
    return (
        f"{size_text(plan.checkpoint_bytes)} a checkpoint{more}; the last {checkpoint.keep_last} and the best kept: "
        f"{size_text(plan.stored_bytes)} at most, in {plan.config.storage.uri}"
    )


def screen(report: RunReport, next_commands: list[tuple[str, str]]) -> str:
    """The report as a run prints it at its end: metrics, verdict, where everything is stored, and what to do next."""
    lines = [f"Run {report.run_id}  {report.status}", ""]
    rows = report.num_rows
    lines.append(
        f"  data     {report.dataset} {report.dataset_version}: "
        f"train {rows['train']:,}  eval {rows['eval']:,}  test {rows['test']:,} rows"
    )
    lines += [f"  mix      {part}" for part in report.mix]
    attempts = "" if report.num_attempts == 1 else f", in {report.num_attempts} attempts"
    workers = f"{report.num_workers} worker{'s' * (report.num_workers > 1)}"
    lines.append(f"  trained  {report.num_steps} steps on {workers}{attempts}")
    if report.throughput is not None:
        lines.append(f"  speed    {rates_text(report.throughput)}  {peak_text(report.throughput)}")
        lines.append(f"  waited   {waits_text(report.throughput)}")
    if report.incidents:
        lines.append("  trouble  " + ", ".join(f"{count} {kind}" for kind, count in report.incidents.items()))
    if report.status == "failed" or report.metrics is None:
        lines += ["", f"  failed in stage `{report.failed_stage}`: {report.error}"]
    else:
        lines += ["", *_metric_table(report), "", f"  {verdict(report)}"]
    lines += ["", "  seconds  " + "  ".join(f"{stage} {seconds:.0f}" for stage, seconds in report.seconds.items())]
    lines += ["", f"  run      {report.run_uri}"]
    if report.best_uri:
        lines.append(f"  model    {report.best_uri}")
    if next_commands:
        lines += ["", "Next:"]
        lines += [f"  {what:<22} {command}" for what, command in next_commands]
    return "\n".join(lines)


def _metric_table(report: RunReport) -> list[str]:
    metrics = report.metrics
    assert metrics is not None
    names = [name for name in ("ndcg@10", "mrr@10", "triplet_accuracy", "loss") if name in metrics.best_eval]
    header = f"  {'':<18}{'eval':^27}  {'test':^27}"
    lines = [header, f"  {'':<18}" + "  ".join([f"{'baseline':>8} {'best':>8} {'change':>9}"] * 2)]
    for name in names:
        cells = [
            _cells(metrics.baseline_eval, metrics.best_eval, name),
            _cells(metrics.baseline_test, metrics.best_test, name),
        ]
        lines.append(f"  {name:<18}" + "  ".join(cells).rstrip())
    epoch = next(entry["epoch"] for entry in metrics.evaluations if entry["step"] == metrics.best_step)
    lines.append(
        f"  best: step {metrics.best_step} of {report.num_steps} (epoch {epoch:g}), by {report.metric} on eval"
    )
    return lines


def _cells(before: Metrics, after: Metrics, name: str) -> str:
    if name not in before or name not in after:
        return " " * 27
    return f"{before[name]:>8.4f} {after[name]:>8.4f} {after[name] - before[name]:>+9.4f}"


def next_commands(report: RunReport, recipe: str) -> list[tuple[str, str]]:
    """(purpose, command) of what a user may do next with a finished run, for `screen`."""
    tercet, python = _program("tercet"), _program("python")
    load = f'from sentence_transformers import SentenceTransformer as S; print(S("{report.best_uri}"))'
    local = "://" not in report.run_uri
    return [
        (
            "look at the report",
            f"{report.run_uri}/{REPORT_PAGE}" if local else f"aws s3 cp {report.run_uri}/{REPORT_PAGE} .",
        ),
        ("load the model", f"{python} -c '{load}'" if local else f"aws s3 cp --recursive {report.best_uri} ./model"),
        (
            "train on a cluster",
            f"{tercet} submit {recipe} --address http://HEAD:8265 --set storage.uri=s3://BUCKET/PREFIX",
        ),
    ]


def _program(name: str) -> str:
    """How to call a program of this environment from the user's shell, where it may not be activated."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path) or not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
