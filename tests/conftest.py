"""Fixtures for all tests. Servers start only when a test asks for one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.s3_server import CannotStart, Gateway, S3Server, moto
from tercet.storage import Storage, open_storage

pytest_plugins = ["support.fixtures"]

AWS_SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


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
    """For torch: operations on tiny models only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Set what a person would set in the shell to work with this server."""
    for name in AWS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return server


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
