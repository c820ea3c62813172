"""Machines that can be cut off and switched off, all on this one: each is a network namespace with an address of its
own. A switch, in a namespace too, joins them, so nothing of this machine's own network is touched.

Needs root and `ip netns` (iproute2).
"""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

INTERFACE = "eth0"


class CannotIsolate(Exception):
    """This machine does not allow network namespaces."""


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Machine:
    """A machine, switched on from the start. `switch_off` kills all its processes and removes it from the network."""

    def __init__(self, switch: str, number: int) -> None:
        self.address = f"10.77.0.{number}"
        self._switch, self._port, self._namespace = switch, f"port{number}", f"{switch}-{number}"
        self._started: list[subprocess.Popen[bytes]] = []
        _ip("netns", "add", self._namespace)
        inside = ("-n", self._namespace)
        _ip(*inside, "link", "add", INTERFACE, "type", "veth", "peer", "name", self._port, "netns", switch)
        _ip("-n", switch, "link", "set", self._port, "master", "bridge", "up")
        _ip(*inside, "address", "add", f"{self.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip(*inside, "link", "set", interface, "up")

    def start(
        self, command: list[str], environment: Mapping[str, str], log: Path, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process on this machine, with its output in `log`. Its pid is that of the command itself."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace, *command],
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def processes(self) -> list[psutil.Process]:
        """All processes of this machine."""
        found = []
        for pid in _ip("netns", "pids", self._namespace).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def named(self, part: str) -> list[psutil.Process]:
        """Processes whose program or title contains `part`."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if part in (process.cmdline() or [""])[0]:
                    found.append(process)
        return found

    def kill(self, part: str) -> None:
        """Send SIGKILL to all processes `named` so. There must be at least one."""
        found = self.named(part)
        assert found, f"no {part} on {self._namespace}: {[process.name() for process in self.processes()]}"
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def cut(self) -> None:
        """Cut the machine off the network. Its processes keep running."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def reconnect(self) -> None:
        """Undo `cut`."""
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def kill_all(self) -> None:
        """Send SIGKILL until no process is left: a process may start another meanwhile."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        for process in self._started:
            process.wait(timeout=10)

    def switch_off(self) -> None:
        self.kill_all()
        _ip("netns", "delete", self._namespace)


class Network:
    """A switch, and the machines connected to it."""

    def __init__(self) -> None:
        """Make the switch. Raises CannotIsolate."""
        self._switch = f"tercet-{uuid.uuid4().hex[:6]}"
        self._machines: list[Machine] = []
        if shutil.which("ip") is None:
            raise CannotIsolate("there is no `ip` (iproute2)")
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
        except subprocess.CalledProcessError as error:
            self.end()
            raise CannotIsolate(f"`{' '.join(error.cmd)}`: {error.stderr.strip()}") from None

    def add(self) -> Machine:
        """Add a machine."""
        self._machines.append(Machine(self._switch, len(self._machines) + 1))
        return self._machines[-1]

    def end(self) -> None:
        """Switch everything off."""
        for machine in self._machines:
            machine.switch_off()
        if Path("/run/netns", self._switch).exists():
            _ip("netns", "delete", self._switch)


@contextmanager
def network() -> Iterator[Network]:
    """A network that is removed at the end, whatever happens. Raises CannotIsolate."""
    made = Network()
    try:
        yield made
    finally:
        made.end()
