"""The result of a run, as a document and as one screen."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Metrics = dict[str, float]

# Names with which a lower value is better.
LOWER_IS_BETTER = {"loss"}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunMetrics(_Document):
    """metrics.json: every measurement of a run, on the eval split and on the test split."""

    baseline_eval: Metrics
    baseline_test: Metrics
    evaluations: tuple[dict[str, float], ...]
    """Each with its step and epoch; the first, of step 0, is the baseline."""
    best_step: int
    best_eval: Metrics
    best_test: Metrics
    """Of the model reloaded from storage in a fresh process."""


class RunReport(_Document):
    """report.json: written at the end of every run, also of a failed one."""

    run_id: str
    status: Literal["finished", "failed"]
    failed_stage: str | None = None
    error: str | None = None
    name: str
    dataset: str
    dataset_version: str
    mix: tuple[str, ...] = ()
    """Each dataset that was trained on, in words, with version, rows, weight and steps; see TrainPlan.shares."""
    num_rows: dict[str, int]
    num_workers: int
    """Of the last attempt."""
    num_attempts: int = 1
    """Starts of the workers. Each but the first went on from a checkpoint, or from nothing where there was none."""
    incidents: dict[str, int] = {}
    """What went wrong on the way, by kind: see docs/failures.md."""
    metric: str
    num_steps: int
    metrics: RunMetrics | None = None
    seconds: dict[str, float]
    """Wall clock by stage, of the attempt that ended the run."""
    run_uri: str
    best_uri: str | None = None

    @property
    def gain(self) -> float:
        """How much better than the baseline the best model is on the test split, by the metric of the recipe."""
        assert self.metrics is not None
        return self.metrics.best_test[self.metric] - self.metrics.baseline_test[self.metric]


def screen(report: RunReport, next_commands: list[tuple[str, str]]) -> str:
    """What a person sees at the end: the metrics, the verdict, where everything lies, and what comes next."""
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


def verdict(report: RunReport) -> str:
    """One sentence: better than the baseline on the test split, or not."""
    assert report.metrics is not None
    before, after = report.metrics.baseline_test[report.metric], report.metrics.best_test[report.metric]
    word = "better than" if report.gain > 0 else "NOT better than"
    change = f"{report.metric} {before:.4f} → {after:.4f} ({report.gain:+.4f})"
    return f"On the test split the best model is {word} the baseline: {change}."


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
    """What a person may want next of a run that finished, and the command that does it, for `screen`."""
    tercet, python = _program("tercet"), _program("python")
    load = f'from sentence_transformers import SentenceTransformer as S; print(S("{report.best_uri}"))'
    local = "://" not in report.run_uri
    return [
        (
            "look at the report",
            f"{report.run_uri}/report.html" if local else f"aws s3 cp {report.run_uri}/report.html .",
        ),
        ("load the model", f"{python} -c '{load}'" if local else f"aws s3 cp --recursive {report.best_uri} ./model"),
        (
            "train on a cluster",
            f"{tercet} submit {recipe} --address http://HEAD:8265 --set storage.uri=s3://BUCKET/PREFIX",
        ),
    ]


def _program(name: str) -> str:
    """How to call a program of this environment from the reader's shell, which may not have it activated."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path) or not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def as_json(document: BaseModel) -> bytes:
    """For storage."""
    return document.model_dump_json(indent=1).encode()


def losses(log_history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, training loss) of every log line that has one."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in log_history if "loss" in entry]
