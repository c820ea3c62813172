"""A process that has imported a worker's libraries once, and forks every worker that a test asks for.

    python fork_server.py SOCKET

A worker is a process of its own: with its own environment, folder and output, and SIGKILL ends it alone. Several ranks
are started as torchrun starts them, see `_watch`. The server ends when its standard input is closed.
See `support.forks` for the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SIGTERM_SECONDS = 30  # torchrun's, between SIGTERM and SIGKILL


def import_libraries() -> None:
    """Import what each worker imports. No import may start a thread, because a fork would not have it."""
    os.environ["DS_ACCELERATOR"], os.environ["DS_IGNORE_CUDA_DETECTION"] = "cpu", "1"  # read when it is imported
    from tercet.model import libraries

    libraries._import_libraries()
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers  # noqa: F401

    import tercet.cli.main
    import tercet.evaluation.evaluate
    import tercet.planning.rows
    import tercet.training.callbacks
    import tercet.training.trainer
    import tercet.training.worker  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    # pyarrow's allocator starts one, and prepares itself for a fork.
    assert [name for name in threads if name != "jemalloc_bg_thd"] == [threads[0]], threads
    assert not torch.distributed.is_initialized()


def serve(listener: socket.socket) -> list[str]:
    """Return in each worker, with its command line. The server itself never returns."""
    while True:
        asked = select.select([listener, sys.stdin], [], [])[0]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if sys.stdin in asked:
            os._exit(0)
        connection, _ = listener.accept()
        data, descriptors, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if os.fork() == 0:
            listener.close()
            return _start(connection, json.loads(data), descriptors)
        connection.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _start(connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Fork the ranks, and return in each of them. This process watches them, and ends when they have ended."""
    num_ranks = request["num_ranks"]
    rendezvous = socket.create_server(("127.0.0.1", 0)) if num_ranks else None
    pids = []
    for rank in range(num_ranks or 1):
        pid = os.fork()
        if pid == 0:
            connection.close()
            if rendezvous is not None:
                request["environment"] |= _variables(rank, num_ranks, rendezvous.getsockname()[1])
                rendezvous.close()
            return _become(request, descriptors)
        pids.append(pid)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.send(str(os.getpid() if num_ranks else pids[0]).encode())
    store = None
    if rendezvous is not None:
        from torch.distributed import TCPStore

        host, port = rendezvous.getsockname()
        store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=rendezvous.detach())
    code = _watch(connection, pids)
    del store
    connection.send(str(int(code != 0) if num_ranks else code).encode())
    os._exit(0)


def _variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank on a single machine."""
    here = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    group = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    elastic = {"RUN_ID": "forked", "RESTART_COUNT": 0, "MAX_RESTARTS": 0, "USE_AGENT_STORE": True}
    named = {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
    return {name: str(value) for name, value in {**here, **group, **named}.items()}


def _watch(connection: socket.socket, pids: list[int]) -> int:
    """Wait for all ranks. After the first failure, or if the test is gone, end the others as torchrun does."""
    running = {os.pidfd_open(pid): pid for pid in pids}
    failed, patience = 0, None
    while running:
        ended = select.select([*running, connection], [], [], patience)[0]
        if connection in ended or not ended:
            _signal(running, signal.SIGKILL)
            patience = None
            if connection in ended:
                os._exit(1)
        for descriptor in ended:
            code = os.waitstatus_to_exitcode(os.waitpid(running.pop(descriptor), 0)[1])
            os.close(descriptor)
            if code and not failed:
                failed, patience = code, SIGTERM_SECONDS
                _signal(running, signal.SIGTERM)
    return failed


def _signal(running: dict[int, int], which: signal.Signals) -> None:
    for descriptor in running:
        signal.pidfd_send_signal(descriptor, which)


def _become(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Take on the output, folder, environment and random numbers of a new process.

    Only the seed of hashes stays the server's: a set of strings has the same order in all forks."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in zip([nothing, *descriptors], (0, 1, 2), strict=True):
        os.dup2(source, target)
        os.close(source)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    numpy.random.seed()
    tempfile.tempdir = None  # TMPDIR may be another
    program: list[str] = request["program"]
    return program


def run(program: list[str]) -> None:
    """A program as `python PROGRAM` runs it: `-m MODULE ARGUMENTS`, or `FILE ARGUMENTS`."""
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = os.getcwd()  # noqa: PTH109
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    import_libraries()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        program = serve(listener)
    run(program)
