"""S3 servers for tests, all on loopback: moto (quick, forgiving), Ceph's RADOS gateway (real), and a faulty proxy.

    python tests/support/s3_server.py start DIR [--port N]    start a gateway that outlives this command
    python tests/support/s3_server.py stop DIR                end its three daemons; DIR keeps its objects

The gateway comes from Debian's packages: installed ones if there are any, else unpacked into a cache folder, without
a system-wide install. It takes about 10 s to start and 1 GB of memory. It checks signatures, honours If-None-Match
and If-Match on a single PUT (and ignores both on CompleteMultipartUpload), and loses nothing on kill -9.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    import pytest

AWS_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
ACCESS_KEY, SECRET_KEY = "testkey", "testsecret"
PACKAGES = ("radosgw", "ceph-mon", "ceph-osd")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tercet-tests" / "ceph"


class CannotStart(RuntimeError):
    """Raised if this machine cannot run the gateway; the message says why."""


@dataclass(frozen=True)
class S3Server:
    """Address and credentials of a server."""

    endpoint_url: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY

    def new_bucket(self) -> str:
        """Make an empty bucket and return its `s3://` URI."""
        import boto3  # type: ignore[import-untyped]

        name = f"test-{uuid.uuid4().hex[:12]}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        client.close()
        return f"s3://{name}"


# --- Ceph's gateway -------------------------------------------------------------------------------------------------


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Set what a user sets in a shell to work with this server; return the server."""
    for name in AWS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return server


class Gateway:
    """One monitor, one file-backed OSD and one gateway in a folder, with their pids, so any process can stop them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.conf = self.folder / "ceph.conf"
        self.ready = self.folder / "ready.json"

    def start(self, port: int | None = None, *, die_with_parent: bool = False) -> S3Server:
        """Start, and return once it answers. `die_with_parent`: end with the parent process. Raises CannotStart."""
        self.root = _programs()
        self.bound = ["setpriv", "--pdeathsig", "TERM", "--"] if die_with_parent and shutil.which("setpriv") else []
        first = not self.ready.exists()
        try:
            if first:
                port = port or free_port()
                self._make_monitor(port)
            else:
                port = json.loads(self.ready.read_text())["port"]
            self._daemon("mon", "ceph-mon", "-i", "a", "-f")
            if first:
                osd = str(uuid.uuid4())
                self._run("/usr/bin/python3", str(self.root / "usr/bin/ceph"), "-c", str(self.conf), "osd", "new", osd)
                self._run("ceph-osd", "-c", str(self.conf), "-i", "0", "--mkfs", "--osd-uuid", osd)
            self._daemon("osd", "ceph-osd", "-i", "0", "-f")
            self._daemon("rgw", "radosgw", "-n", "client.rgw", "-f")
            endpoint = f"http://127.0.0.1:{port}"
            self._wait_for(endpoint)
            if first:
                keys = (f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}")
                admin = ("radosgw-admin", "-c", str(self.conf), "-n", "client.rgw")
                self._run(*admin, "user", "create", "--uid=test", "--display-name=test", *keys)
                self.ready.write_text(json.dumps({"port": port}))
        except BaseException:
            self.stop()
            raise
        return S3Server(endpoint)

    def stop(self) -> None:
        """End the daemons that `start` started: by SIGTERM, then by SIGKILL after 5 s each."""
        for name in ("rgw", "osd", "mon"):
            pid_file = self.folder / f"{name}.pid"
            if not pid_file.exists():
                continue
            pid = int(pid_file.read_text())
            for sign in (signal.SIGTERM, signal.SIGKILL):
                deadline = time.monotonic() + 5
                if self._runs(pid):
                    os.kill(pid, sign)
                while self._runs(pid) and time.monotonic() < deadline:
                    time.sleep(0.05)
            pid_file.unlink()

    def _runs(self, pid: int) -> bool:
        """Whether the process lives and is still our daemon, rather than a later process with the same pid."""
        try:
            ours = str(self.conf).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it has ended
        except (FileNotFoundError, ProcessLookupError):
            ours = False
        with contextlib.suppress(ChildProcessError):  # it is our child only in the process that started it
            os.waitpid(pid, os.WNOHANG if ours else 0)
        return ours

    def _environment(self) -> dict[str, str]:
        libraries = [str(path) for path in (*self.root.glob("usr/lib/*-linux-gnu"), *self.root.glob("lib/*-linux-gnu"))]
        libraries += [f"{path}/ceph" for path in libraries]
        python = str(self.root / "usr/lib/python3/dist-packages")
        path = f"{self.root}/usr/bin:{os.environ.get('PATH', '/usr/bin:/bin')}"
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "PYTHONPATH": python, "PATH": path}

    def _run(self, *command: str) -> None:
        environment = self._environment()
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        try:
            done = subprocess.run([program, *command[1:]], env=environment, capture_output=True, timeout=180, text=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotStart(f"{command[0]}: {error}") from error
        if done.returncode:
            raise CannotStart(f"{' '.join(command)} failed ({done.returncode}): {(done.stderr or done.stdout)[-400:]}")

    def _daemon(self, name: str, program: str, *arguments: str) -> None:
        binary = str(self.root / "usr/bin" / program)
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [*self.bound, binary, "-c", str(self.conf), *arguments],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        (self.folder / f"{name}.pid").write_text(str(process.pid))
        process.returncode = 0  # `stop` reaps it by its pid; without this Popen warns that it still runs

    def _wait_for(self, endpoint: str) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), contextlib.closing(urllib.request.urlopen(endpoint, timeout=5)):
                return
            time.sleep(0.1)
        raise CannotStart(f"no answer at {endpoint} in 240 s; see {self.folder / 'log'}")

    def _make_monitor(self, port: int) -> None:
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        fsid, monitor = str(uuid.uuid4()), f"[v2:127.0.0.1:{free_port()}/0]"
        library = next(iter(self.root.glob("usr/lib/*-linux-gnu/ceph")), self.root / "usr/lib/ceph")
        self.conf.write_text(
            CONF.format(dir=self.folder, fsid=fsid, monitor=monitor, port=port, lib=library, classes=library.parent)
        )
        keyring = self.folder / "keyring"
        self._run("ceph-authtool", str(keyring), "-C")
        for name, *caps in (
            ("mon.", "mon", "allow *"),
            ("client.admin", "mon", "allow *", "osd", "allow *", "mgr", "allow *"),
            ("osd.0", "mon", "allow profile osd", "osd", "allow *"),
            ("client.rgw", "mon", "allow rw", "osd", "allow rwx"),
        ):
            flags = [part for kind, cap in zip(caps[::2], caps[1::2], strict=True) for part in ("--cap", kind, cap)]
            self._run("ceph-authtool", str(keyring), "--gen-key", "-n", name, *flags)
        monmap = str(self.folder / "monmap")
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor.replace("/0]", "]"), monmap)
        mkfs = ("--mkfs", "-i", "a", "--monmap", monmap, "--keyring", str(keyring))
        self._run("ceph-mon", "-c", str(self.conf), *mkfs)


CONF = """\
[global]
fsid = {fsid}
mon_host = {monitor}
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
public_network = 127.0.0.0/8
ms_bind_ipv6 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
run_dir = {dir}/run
admin_socket = {dir}/run/$name.asok
log_file = {dir}/log/$name.log
log_to_stderr = false
plugin_dir = {lib}
erasure_code_dir = {lib}/erasure-code
osd_class_dir = {classes}/rados-classes
keyring = {dir}/keyring
[mon]
paxos_propose_interval = 0.02
paxos_min_wait = 0.02
mon_tick_interval = 1
mon_cluster_log_file = {dir}/log/cluster.log
mon_data = {dir}/mon
mon_data_avail_warn = 1
mon_data_avail_crit = 1
[osd]
osd_data = {dir}/osd
osd_objectstore = bluestore
bluestore_block_size = 21474836480
bluestore_block_create = true
osd_memory_target = 939524096
osd_max_object_name_len = 2048
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {dir}/rgw
rgw_enable_usage_log = false
rgw_max_objs_per_shard = 200000
rgw_dynamic_resharding = false
"""


def _programs() -> Path:
    """Return the root of the gateway's programs: the system's, or a cache that is filled once. Raises CannotStart."""
    needed = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
    for root in (Path("/"), CACHE):
        if all((root / "usr/bin" / name).exists() for name in needed):
            return root
    if not shutil.which("apt-get"):
        raise CannotStart("no radosgw here, and no apt-get to fetch it with")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE.with_suffix(".lock")):  # apt's own lock makes a second one fail
        return CACHE if (CACHE / "usr/bin").exists() else _fetched()


def _fetched() -> Path:
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
        debs, root = Path(folder, "debs"), Path(folder, "root")
        (debs / "partial").mkdir(parents=True)
        fetch = ("--download-only", "--no-install-recommends", "-o", f"Dir::Cache::archives={debs}")
        user = ("-o", "APT::Sandbox::User=root")
        try:
            for command in (("apt-get", "update"), ("apt-get", "install", "-y", *fetch, *user, *PACKAGES)):
                subprocess.run(command, check=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
            for deb in debs.glob("*.deb"):
                subprocess.run(["dpkg", "-x", deb, root], check=True, capture_output=True, timeout=60)
        except subprocess.CalledProcessError as error:
            raise CannotStart(f"{' '.join(map(str, error.cmd))}: {error.stderr[-300:].decode()}") from error
        except subprocess.TimeoutExpired as error:
            raise CannotStart(str(error)) from error
        root.rename(CACHE)
    return CACHE


def free_port() -> int:
    """Return a port that neither the system nor Ray hands out to another process before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise CannotStart("no port between 20000 and 32000 is free")


@contextmanager
def silent_address() -> Iterator[str]:
    """Reserve a `host:port` on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


# --- moto -----------------------------------------------------------------------------------------------------------


@contextmanager
def moto() -> Iterator[S3Server]:
    """Run moto's server in a thread. It accepts any credentials and stores nothing on disk."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request, in the report of each failure
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    wsgi: Any = server._server
    app, one_at_a_time = wsgi.app, threading.Lock()

    def answer(environ: Any, start_response: Any) -> Any:
        """moto checks a condition and then writes, so that in threads two conditional writes could both win."""
        with one_at_a_time:
            return app(environ, start_response)

    wsgi.app = answer
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


# --- a proxy with faults --------------------------------------------------------------------------------------------


REFUSALS = {"refuse": (503, ""), "forgotten": (404, "NoSuchUpload"), "expired": (400, "ExpiredToken")}


class FaultyProxy:
    """A proxy that damages chosen requests to a real server as networks do. All other requests pass unchanged.

    fail("PUT", "lose_reply") queues one fault for the next request of that method:

    lose_reply  the server does it, the client never hears of it
    refuse      503, without asking the server
    forgotten   404 NoSuchUpload, without asking the server
    expired     400 ExpiredToken, without asking the server
    flip        one bit of the answer's body is another
    cut         half of the answer's body, then the connection closes
    stall       no answer until the proxy closes
    pass        none, to reach the request after this one

    `decide(method, path)` chooses the fault of every request for which none is queued.
    """

    def __init__(self, server: S3Server) -> None:
        self.faults: list[tuple[str, str]] = []
        self.decide: Callable[[str, str], str | None] = lambda method, path: None  # noqa: ARG005
        self.requests: list[str] = []
        self._closing, self._choosing = threading.Event(), threading.Lock()
        upstream = server.endpoint_url.removeprefix("http://")
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def pass_on(self) -> None:
                proxy.requests.append(f"{self.command} {self.path}")
                fault = proxy._fault_for(self.command) or proxy.decide(self.command, self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fault == "stall":
                    proxy._closing.wait()
                    self.close_connection = True
                    return
                if fault in REFUSALS:
                    status, code = REFUSALS[fault]
                    text = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                    return
                with contextlib.closing(http.client.HTTPConnection(upstream, timeout=120)) as connection:
                    connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() not in ("expect", "connection"):
                            connection.putheader(name, value)
                    connection.endheaders(body)
                    reply = connection.getresponse()
                    data = bytearray(reply.read())
                if fault == "lose_reply":
                    self.close_connection = True
                    return
                if fault == "flip":
                    data[len(data) // 2] ^= 1
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = reply.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if fault == "cut":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def fail(self, method: str, fault: str, times: int = 1) -> None:
        self.faults += [(method, fault)] * times

    def _fault_for(self, method: str) -> str | None:
        with self._choosing:
            for queued in self.faults:
                if queued[0] == method:
                    self.faults.remove(queued)
                    return queued[1]
        return None

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Start or stop a real S3 server on loopback.")
    parser.add_argument("verb", choices=("start", "stop"))
    parser.add_argument("dir", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.verb == "stop":
        Gateway(options.dir).stop()
        return
    try:
        server = Gateway(options.dir).start(options.port)
    except CannotStart as error:
        sys.exit(f"cannot start: {error}")
    print(f"AWS_ENDPOINT_URL={server.endpoint_url} AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")


if __name__ == "__main__":
    main()
