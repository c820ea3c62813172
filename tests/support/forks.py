"""Processes forked from one that has already imported torch and the other libraries, which saves 5 s each."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PROGRAM = Path(__file__).parent / "programs" / "fork_server.py"
START_SECONDS = 240
READ_AT_IMPORT = ("HF_", "OMP_", "MKL_", "DS_", "TRANSFORMERS_", "TORCH", "PYTHON", "CUDA_")
"""Prefixes of the variables that a library reads while it is imported."""


@dataclass(frozen=True)
class Forked:
    """A Python program, such as `-m tercet.cli worker plan.json`, on `num_ranks` ranks or (0) without torchrun."""

    program: tuple[str, ...]
    num_ranks: int = 0

    @property
    def command(self) -> list[str]:
        """Return the same program as a command line, which imports everything itself."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        launcher += ["--nproc-per-node", str(self.num_ranks)]
        return [sys.executable, *(launcher if self.num_ranks else []), *self.program]


class ForkedProcess:
    """A running program, with the interface of subprocess.Popen.

    `pid` is the worker, or the process that watches several ranks; SIGKILL to it ends all of them."""

    def __init__(self, program: Forked, connection: socket.socket) -> None:
        self.args, self.returncode, self._connection = list(program.program), None, connection
        self.pid = int(connection.recv(64))
        self.returncode: int | None

    def poll(self, seconds: float | None = 0) -> int | None:
        """Return the exit code, or None if the program still runs after waiting this long."""
        if self.returncode is None and select.select([self._connection], [], [], seconds)[0]:
            self.returncode = int(self._connection.recv(64) or -signal.SIGKILL)
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        code = self.poll(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def send_signal(self, which: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, which)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.read_at_import = _read_at_import(environment)
        folder = tempfile.TemporaryDirectory(prefix="tercet-forks-", ignore_cleanup_errors=True)
        self._address = f"{folder.name}/socket"
        log = Path(folder.name, "log")
        with log.open("wb") as out:
            command, output = [sys.executable, str(PROGRAM), self._address], {"stdout": out, "stderr": out}
            self._process = subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, **output)
        atexit.register(self._end, folder)
        deadline = time.monotonic() + START_SECONDS
        while not Path(self._address).exists():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def _end(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._process.communicate(timeout=60)
        folder.cleanup()

    def start(self, program: Forked, environment: Mapping[str, str], cwd: Path, out: IO[Any]) -> ForkedProcess:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._address)
        request = {"program": program.program, "num_ranks": program.num_ranks, "cwd": str(cwd)}
        data = json.dumps({**request, "environment": dict(environment)}).encode()
        socket.send_fds(connection, [data], [out.fileno(), out.fileno()])
        return ForkedProcess(program, connection)


_servers: list[_Server] = []


Process = ForkedProcess | subprocess.Popen[Any]


def start(program: Forked, environment: Mapping[str, str], cwd: Path, out: IO[Any]) -> Process:
    """Start a program; `out` gets all that it prints. Forked, unless the libraries would have to be imported again."""
    if not _servers:
        _servers.append(_Server(environment))
    if _servers[0].read_at_import != _read_at_import(environment):
        return subprocess.Popen(program.command, env=dict(environment), cwd=cwd, stdout=out, stderr=out)
    return _servers[0].start(program, environment, cwd, out)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}
