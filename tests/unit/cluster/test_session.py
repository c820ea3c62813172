"""A cluster that does not answer."""

from __future__ import annotations

import socket

import pytest

from support.s3_server import silent_address
from tercet.cluster.session import RAY_PATIENCE, start_ray, wait_for_head
from tercet.config.sections import WorkersConfig
from tercet.errors import ConfigError, TrainingError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_PATIENCE[0], "1")


def test_a_head_that_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wait_for_head(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_head_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_address() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(TrainingError, match=f"no Ray cluster answers at {address}") as caught:
            start_ray(WorkersConfig())
    assert "unset RAY_ADDRESS" in caught.value.hint


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "head", "head:port", "a..b:6379"])
def test_an_invalid_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: ") as caught:
        start_ray(WorkersConfig())
    assert "6379" in caught.value.hint
