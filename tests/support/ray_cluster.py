"""A Ray cluster on machines of its own (see machines.py): a head without room for workers, and nodes with one CPU each.
What runs on it can be killed one by one, and nodes can be cut off."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.commands import tercet
from support.machines import INTERFACE, Machine, Network, network
from tercet.artifacts.lease import Attempt, read_attempts
from tercet.failpoints import VARIABLE
from tercet.storage import open_storage

# Time limit of every wait. Shorter than the lease of ten minutes, so that a command that waits for one fails.
PATIENCE_SECONDS = 400

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
CONTROLLER = "ray::TrainController"  # process title of Ray Train's controller, an actor on the driver's machine

WORKER = "ray::RayTrainWorker"

# Ray gives up a silent node, or head, after about a minute. On one machine it can decide sooner.
SHORT_PATIENCE = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
}


class RayCluster:
    """A cluster started with `ray start`. Drivers run on the head; `laptop` is a machine without Ray."""

    def __init__(self, machines: Network, folder: Path, environment: Mapping[str, str], dashboard: bool) -> None:
        """folder: a short path, because socket names have 107 characters at most. dashboard: accept jobs."""
        self._machines, self._folder = machines, folder
        settings = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "GLOO_SOCKET_IFNAME": INTERFACE}
        self._environment = {**environment, **settings, **SHORT_PATIENCE, "NO_PROXY": "*"}
        self.head, self.laptop = machines.add(), machines.add()
        self.nodes: list[Machine] = []
        self._drivers: list[subprocess.Popen[bytes]] = []
        self._address = f"{self.head.address}:6379"
        self.dashboard = f"http://{self.head.address}:8265"
        place = ["--include-dashboard", str(dashboard), "--dashboard-host", self.head.address]
        started = self._ray_start(self.head, "--head", *place, "--num-cpus", "0")
        self._wait_for(started, self.head)

    def provide(self, num_nodes: int) -> None:
        """Keep the living nodes and add new ones up to this number, each with room for one worker."""
        self.nodes = [node for node in self.nodes if node.named("raylet")]
        added = [self._machines.add() for _ in range(num_nodes - len(self.nodes))]
        started = [self._ray_start(node, "--address", self._address, "--num-cpus", "1") for node in added]
        for process, node in zip(started, added, strict=True):
            self._wait_for(process, node)
        self.nodes += added

    def drain(self, node: Machine, seconds: int) -> None:
        """Announce, as a cloud does for a spot machine, that a node will be gone after this many seconds."""
        # Without a node id the command takes any raylet that it sees, and all machines share their process ids.
        named = next(part for part in node.named("raylet")[0].cmdline() if part.startswith("--node_id="))
        which = ["--address", self._address, "--node-id", named.removeprefix("--node_id=")]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [*RAY, "drain-node", *which, *why, "--deadline-remaining-seconds", str(seconds)]
        self._wait_for(node.start(command, self._environment, self._log(node)), node)
        self.nodes.remove(node)

    def num_logs_with(self, text: str) -> int:
        """Number of Ray's log files, on all machines, that contain the text."""
        logs = [path for path in self._folder.rglob("*.log") if not path.is_symlink()]
        return sum(text in path.read_text(errors="replace") for path in logs)

    def _ray_start(self, machine: Machine, *arguments: str) -> subprocess.Popen[bytes]:
        place = ["--node-ip-address", machine.address, "--temp-dir", str(self._folder / machine.address)]
        command = [*RAY, "start", "--disable-usage-stats", *arguments, *place, "--object-store-memory", "80000000"]
        return machine.start(command, self._environment, self._log(machine))

    def _wait_for(self, process: subprocess.Popen[bytes], machine: Machine) -> None:
        assert process.wait(timeout=240) == 0, self._log(machine).read_text()

    def _log(self, machine: Machine) -> Path:
        return self._folder / f"{machine.address}.log"

    def start(
        self, command: list[str], log: Path, variables: Mapping[str, str] | None = None, where: Machine | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command such as `tercet train`, on the head with this cluster as RAY_ADDRESS, or on the laptop."""
        environment = {**self._environment, **(variables or {})}
        if where is None:
            environment["RAY_ADDRESS"] = self._address
        self._drivers.append((where or self.head).start(command, environment, log, log.parent))
        return self._drivers[-1]

    def end_drivers(self) -> None:
        """Kill the commands that still run. Ray then ends the processes that they started."""
        for driver in self._drivers:
            driver.kill()
            driver.wait(timeout=60)

    def switch_off(self) -> None:
        """Switch off the head and all nodes at once. The laptop stays."""
        for machine in (self.head, *self.nodes):
            machine.kill_all()

    def machine_of(self, pid: int) -> Machine:
        """Return the node that a process runs on."""
        return next(node for node in self.nodes if pid in [process.pid for process in node.processes()])


@contextmanager
def ray_cluster(environment: Mapping[str, str], dashboard: bool = False) -> Iterator[RayCluster]:
    """A cluster that is removed at the end, whatever happens. Raises CannotIsolate."""
    folder = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))
    try:
        with network() as machines:
            yield RayCluster(machines, folder, environment, dashboard)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Run:
    """A run and its command: on the head, or from the laptop as a job."""

    run_id: str
    recipe: Path
    store: Path

    def train(self, cluster: RayCluster, armed: str = "") -> subprocess.Popen[bytes]:
        """Start `tercet train`."""
        command = tercet("train", self.recipe, "--run-id", self.run_id)
        return cluster.start(command, self.recipe.with_suffix(".log"), {VARIABLE: armed} if armed else {})

    def ends(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Return the exit code, and the output since the run began."""
        code = process.wait(timeout=PATIENCE_SECONDS)
        return code, self.recipe.with_suffix(".log").read_text()

    def ends_well(self, process: subprocess.Popen[bytes]) -> str:
        code, output = self.ends(process)
        assert code == 0, output[-6000:]
        return output

    def rank_0(self) -> int:
        """Return the process id that holds the lease."""
        pid: int = json.loads((self.store / "runs" / self.run_id / "LEASE.json").read_text())["pid"]
        return pid

    def attempts(self) -> tuple[Attempt, ...]:
        return read_attempts(open_storage(str(self.store)), self.run_id)
