"""Two lines of a training's log in a process of Ray's, and what the port of its node then serves: one metric a line."""

from __future__ import annotations

import time
import urllib.request

import ray

from tercet.artifacts.throughput import Throughput


@ray.remote
class Worker:
    """Exports as a worker does."""

    def __init__(self) -> None:
        from tercet.cluster.metrics import ThroughputMetrics

        self._metrics = ThroughputMetrics("a-run", rank=3)

    def line(self) -> None:
        """Export ten steps."""
        seconds = {"compute": 8.0, "data": 2.0}
        self._metrics(Throughput(num_steps=10, num_rows=160, num_tokens=1000, seconds=seconds))  # type: ignore[arg-type]


ray.init(address="local", num_cpus=1, include_dashboard=False)
worker = Worker.remote()  # type: ignore[attr-defined]
for _ in range(2):
    ray.get(worker.line.remote())
node = ray.nodes()[0]
metrics: list[str] = []
ends_at = time.monotonic() + 60
while not any("tercet_tokens_total" in line for line in metrics) and time.monotonic() < ends_at:
    time.sleep(0.2)
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
        metrics = [line for line in page.read().decode().splitlines() if line.startswith("ray_tercet_")]
print("\n".join(metrics))
