"""The throughput of each rank in Ray's own metrics, which Prometheus reads from the port of each node."""

from __future__ import annotations

from tercet.artifacts.throughput import Throughput

TAGS = ("run", "rank")


class ThroughputMetrics:
    """Sets Ray's metrics at each line of the training's log. Ray puts `ray_` before each name.

    Counters begin at 0 in each attempt, as Prometheus expects of a process that restarts."""

    def __init__(self, run_id: str, rank: int) -> None:
        """To be made in a process of Ray's."""
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, description: str) -> Gauge:
            metric = Gauge(f"tercet_{name}", description, TAGS)
            metric.set_default_tags(tags)
            return metric

        def counter(name: str, description: str) -> Counter:
            metric = Counter(f"tercet_{name}", description, TAGS)
            metric.set_default_tags(tags)
            return metric

        tags = {"run": run_id, "rank": str(rank)}
        self._tokens_per_second = gauge("tokens_per_second", "Tokens of texts a second of training, of this rank.")
        self._rows_per_second = gauge("rows_per_second", "Rows a second of training, of this rank.")
        self._share_of_peak = gauge("share_of_peak", "Floating-point operations done, of those at the device's peak.")
        self._peak_memory = gauge("peak_memory_bytes", "The most memory that this rank had allocated.")
        self._tokens = counter("tokens_total", "Tokens of texts that this rank trained on.")
        self._rows = counter("rows_total", "Rows that this rank trained on.")
        self._steps = counter("steps_total", "Optimizer steps of this rank.")
        self._seconds = {
            phase: counter(f"{phase}_seconds_total", f"Seconds of this rank in the phase {phase}.")
            for phase in ("compute", "data", "ranks", "storage", "evaluation", "start")
        }

    def __call__(self, throughput: Throughput) -> None:
        """Export what this rank did since the last line of the log."""
        self._tokens_per_second.set(throughput.tokens_per_second)
        self._rows_per_second.set(throughput.rows_per_second)
        self._share_of_peak.set(throughput.share_of_peak)
        self._peak_memory.set(throughput.peak_memory_bytes)
        counts = [
            (self._tokens, throughput.num_tokens),
            (self._rows, throughput.num_rows),
            (self._steps, throughput.num_steps),
            *((self._seconds[phase], seconds) for phase, seconds in throughput.seconds.items()),
        ]
        for counter, count in counts:
            if count > 0:  # Ray refuses to count nothing
                counter.inc(count)
