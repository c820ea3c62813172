"""Fixtures for all tests. Servers start only when a test asks for one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.s3_server import CannotStart, Gateway, S3Server, moto, use
from tercet.storage import Storage, open_storage

# One thread for torch, which reads this when it is imported. Threads of several pytest processes wait for each other's
# cores, and a tiny model has nothing to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The code of models that bring their own, apart from that of other processes. transformers reads this when it is
# imported, and a process cannot change it afterwards.
_modules_cache = tempfile.TemporaryDirectory(prefix="tercet-modules-")
os.environ["HF_MODULES_CACHE"] = _modules_cache.name

pytest_plugins = ["support.fixtures"]


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the real S3 server to `make soak`, except in tests marked `on_rgw`, because moto is faster."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        on_rgw = any(isinstance(value, str) and value == "rgw" for value in parameters.values())
        if on_rgw and item.get_closest_marker("on_rgw") is None:
            item.add_marker("soak")


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Server]:
    """A quick S3 server in this process; it checks no credentials."""
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def rgw_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, Ceph's gateway. Skips where it cannot start, unless TERCET_REQUIRE_RGW=1."""
    for attempt in (1, 2):  # once more, because another process may take a port before the gateway does
        gateway = Gateway(tmp_path_factory.mktemp("rgw"))
        try:
            server = gateway.start(die_with_parent=True)
            break
        except CannotStart as error:
            if attempt == 1:
                continue
            if os.environ.get("TERCET_REQUIRE_RGW") == "1":
                raise
            pytest.skip(f"no real S3 server here: {error}")
    try:
        yield server
    finally:
        gateway.stop()
        shutil.rmtree(gateway.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: on tiny models, threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["moto", "rgw"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each S3 server in turn, with its settings in the environment."""
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    return use(server, monkeypatch)


@pytest.fixture(params=["local", "moto", "rgw"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    """Each kind of storage in turn, open on an empty root, with its settings in the environment."""
    if request.param == "local":
        return open_storage(str(tmp_path / "storage"))
    server: S3Server = use(request.getfixturevalue(f"{request.param}_s3"), monkeypatch)
    return open_storage(f"{server.new_bucket()}/some/prefix")
