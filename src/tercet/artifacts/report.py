"""The result of a run, as a document and as an HTML page."""

from __future__ import annotations

from html import escape
from typing import Any, ClassVar, Literal

from pydantic import Field

from tercet.artifacts.throughput import Phase, Throughput
from tercet.storage.documents import Document

Metrics = dict[str, float]

# Metrics of which a lower value is better.
LOWER_IS_BETTER = {"loss"}


class RunMetrics(Document):
    """metrics.json: every measurement of a run on the eval and test splits."""

    once_unsealed: ClassVar[bool] = True

    baseline_eval: Metrics
    baseline_test: Metrics
    evaluations: tuple[dict[str, float], ...]
    """Metrics on the eval split with their step and epoch; the first, of step 0, is the baseline."""
    best_step: int
    best_eval: Metrics
    best_test: Metrics
    """Metrics of the model reloaded from storage in a fresh process."""
    test_precision: str | None = None
    """Precision in which the test split was measured; None in what earlier versions of tercet wrote."""


class RunReport(Document):
    """report.json: written at the end of every run, even a failed one."""

    once_unsealed: ClassVar[bool] = True

    run_id: str
    status: Literal["finished", "failed"]
    failed_stage: str | None = None
    error: str | None = None
    name: str
    dataset: str
    dataset_version: str
    mix: tuple[str, ...] = ()
    """One human-readable line per dataset with version, rows, weight and steps; see TrainPlan.shares."""
    num_rows: dict[str, int]
    num_workers: int
    """Number in the last attempt."""
    num_attempts: int = 1
    """Starts of the workers. Each but the first resumed from a checkpoint, or from the beginning if there was none."""
    incidents: dict[str, int] = Field(default_factory=dict)
    """Number of incidents by kind: see docs/failures.md."""
    metric: str
    num_steps: int
    metrics: RunMetrics | None = None
    seconds: dict[str, float]
    """Wall-clock seconds by stage, of the driver that ended the run."""
    run_uri: str
    best_uri: str | None = None
    throughput: Throughput | None = None
    """How fast the steps were that the last checkpoint builds on, and where their time went."""

    @property
    def gain(self) -> float:
        """Best model less baseline on the test split, by the metric of the recipe."""
        assert self.metrics is not None
        return self.metrics.best_test[self.metric] - self.metrics.baseline_test[self.metric]


def verdict(report: RunReport) -> str:
    """Return one sentence: whether the best model is better than the baseline on the test split."""
    assert report.metrics is not None
    before, after = report.metrics.baseline_test[report.metric], report.metrics.best_test[report.metric]
    word = "better than" if report.gain > 0 else "NOT better than"
    change = f"{report.metric} {before:.4f} → {after:.4f} ({report.gain:+.4f})"
    return f"On the test split the best model is {word} the baseline: {change}."


def losses(log_history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, training loss) of every log entry that has a loss."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in log_history if "loss" in entry]


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}.sub{color:#57606a;margin:0 0 1rem}
.verdict{border-left:4px solid #1a7f37;background:#f0fff4;padding:.6rem 1rem}
.verdict.no{border-color:#cf222e;background:#fff5f5}
table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #d0d7de}
td:first-child,th:first-child{text-align:left;padding-left:0}code{font-size:.9em;word-break:break-all}
.charts{display:flex;margin-top:1rem;flex-wrap:wrap;gap:1.5rem}svg text{font:11px system-ui,sans-serif;fill:#57606a}
.bar{display:flex;height:14px;width:440px;max-width:100%;margin:0 0 .5rem}
.up{color:#1a7f37}.down{color:#cf222e}
"""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 230, 52, 14, 14, 34


def html(report: RunReport, log_history: list[dict[str, Any]], recipe_yaml: str) -> str:
    """Return the report as a self-contained HTML page. `log_history` is that of the trainer."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(report.run_id)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(report.name)}</h1><p class=sub>run {escape(report.run_id)} · {report.status} · "
        f"{escape(report.dataset)} {report.dataset_version} · {report.num_workers} worker(s), "
        f"{report.num_attempts} attempt(s)"
        + "".join(f", {count} {escape(kind)}" for kind, count in report.incidents.items())
        + "</p>",
    ]
    if report.metrics is None:
        parts.append(
            f"<p class='verdict no'>Failed in stage <b>{escape(str(report.failed_stage))}</b>: "
            f"{escape(str(report.error))}</p>"
        )
    else:
        parts += [f"<p class='verdict{'' if report.gain > 0 else ' no'}'>{escape(verdict(report))}</p>", _table(report)]
        evaluations = [(int(e["step"]), e[report.metric]) for e in report.metrics.evaluations]
        eval_losses = [(int(e["step"]), e["loss"]) for e in report.metrics.evaluations if "loss" in e]
        parts.append("<h2>Training</h2><div class=charts>")
        parts.append(_chart({"train loss": losses(log_history), "eval loss": eval_losses}, "loss by step"))
        parts.append(_chart({report.metric: evaluations}, f"{report.metric} on eval by step", report.metrics.best_step))
        parts.append("</div>")
    if report.throughput is not None:
        parts.append(_throughput(report.throughput, log_history))
    rows = "".join(f"<tr><td>{escape(stage)}<td>{seconds:.1f}" for stage, seconds in report.seconds.items())
    parts.append(f"<h2>Time</h2><table><tr><th>stage<th>seconds{rows}</table>")
    sizes = "".join(f"<tr><td>{name}<td>{count:,}" for name, count in report.num_rows.items())
    parts.append(f"<h2>Data</h2><table><tr><th>split<th>rows{sizes}</table>")
    parts.append(f"<h2>Where</h2><p>run: <code>{escape(report.run_uri)}</code>")
    if report.best_uri:
        parts.append(f"<br>model: <code>{escape(report.best_uri)}</code>")
    parts.append(f"</p><h2>Recipe</h2><pre><code>{escape(recipe_yaml)}</code></pre></html>\n")
    return "\n".join(parts)


_PHASES: dict[Phase, tuple[str, str]] = {
    "compute": ("steps", "#1a7f37"),
    "data": ("waiting for data", "#bf8700"),
    "ranks": ("waiting for other ranks", "#8250df"),
    "storage": ("checkpoints", "#cf222e"),
    "evaluation": ("evaluations", "#0969da"),
    "start": ("start", "#8c959f"),
}


def _throughput(throughput: Throughput, log_history: list[dict[str, Any]]) -> str:
    """Return rates, a bar of where the time of the training went, and the tokens per second by step."""
    total = sum(throughput.seconds.values()) or 1.0
    cells = {
        "rows/s": f"{throughput.rows_per_second:,.1f}",
        "tokens/s": f"{throughput.tokens_per_second:,.0f}",
        "steps/s": f"{throughput.steps_per_second:,.2f}",
        f"of {throughput.peak_source}": f"{100 * throughput.share_of_peak:.1f} %",
        "padding": f"{100 * throughput.share_of_padding:.1f} %",
        "peak memory of a rank": f"{throughput.peak_memory_bytes / 1e9:.1f} GB",
    }
    phases = [
        (label, throughput.seconds[phase], color)
        for phase, (label, color) in _PHASES.items()
        if phase in throughput.seconds
    ]
    bar = "".join(
        f"<span style='flex:{seconds:.6f};background:{color}' title='{label} {seconds:.1f} s'></span>"
        for label, seconds, color in phases
    )
    legend = "".join(
        f"<tr><td><span style='color:{color}'>■</span> {label}<td>{seconds:,.1f}<td>{100 * seconds / total:.1f} %"
        for label, seconds, color in phases
    )
    points = [
        (int(entry["step"]), float(entry["tokens_per_second"])) for entry in log_history if "tokens_per_second" in entry
    ]
    return (
        "<h2>Throughput</h2>"
        "<table><tr>"
        + "".join(f"<th>{escape(name)}" for name in cells)
        + "<tr>"
        + "".join(f"<td>{value}" for value in cells.values())
        + "</table>"
        "<div class=charts>"
        + _chart({"tokens/s": points}, "tokens per second by step")
        + f"<div><p class=sub>{total:,.0f} s of training, mean of the ranks</p><div class=bar>{bar}</div>"
        f"<table><tr><th>phase<th>seconds<th>share{legend}</table></div></div>"
    )


def _table(report: RunReport) -> str:
    metrics = report.metrics
    assert metrics is not None
    rows = []
    for split, before, after in (
        ("test", metrics.baseline_test, metrics.best_test),
        ("eval", metrics.baseline_eval, metrics.best_eval),
    ):
        for name in (name for name in before if name in after):
            change = after[name] - before[name]
            good = change < 0 if name in LOWER_IS_BETTER else change > 0
            rows.append(
                f"<tr><td>{escape(name)} ({split})<td>{before[name]:.4f}<td>{after[name]:.4f}"
                f"<td class={'up' if good else 'down'}>{change:+.4f}"
            )
    return f"<table><tr><th>metric<th>baseline<th>best<th>change{''.join(rows)}</table>"


def _number(value: float, digits: str = ".3g") -> str:
    return format(value, ",.0f" if abs(value) >= 1000 else digits)


def _chart(lines: dict[str, list[tuple[int, float]]], title: str, best_step: int | None = None) -> str:
    """Return a line chart as inline SVG. Each line is a list of (step, value)."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    x_max = max(max(step for step, _ in every), 1)
    low, high = min(value for _, value in every), max(value for _, value in every)
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return _LEFT + step / x_max * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    svg = [f"<figure style='margin:0'><figcaption>{escape(title)}</figcaption>"]
    svg.append(
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='{escape(title)}'>"
    )
    for index in range(5):
        value = low + (high - low) * index / 4
        svg.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y(value):.1f}' y2='{y(value):.1f}' stroke='#eaeef2'/>"
        )
        svg.append(f"<text x='{_LEFT - 6}' y='{y(value) + 4:.1f}' text-anchor='end'>{_number(value)}</text>")
        step = x_max * index / 4
        svg.append(f"<text x='{x(step):.1f}' y='{_HEIGHT - _BOTTOM + 16}' text-anchor='middle'>{step:.0f}</text>")
    for position, (name, points) in enumerate(lines.items()):
        color = ("#0969da", "#bc4c00")[position % 2]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        svg.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2' stroke-linejoin='round'/>")
        svg += [
            f"<circle cx='{x(step):.1f}' cy='{y(value):.1f}' r='{5 if step == best_step else 2.5}' fill='{color}'>"
            f"<title>step {step}: {_number(value, '.4f')}</title></circle>"
            for step, value in points
        ]
        svg.append(
            f"<text x='{_LEFT + 8 + 90 * position}' y='{_HEIGHT - 4}' style='fill:{color}'>● {escape(name)}</text>"
        )
    return "".join([*svg, "</svg></figure>"])
