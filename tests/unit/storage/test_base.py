"""`~` in a path that a user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.errors import ConfigError
from tercet.storage import open_storage
from tercet.storage.base import expand_home


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/x") == Path("/home/me/x")
    assert expand_home("a/~/x") == Path("a/~/x")
    assert open_storage("~/x").uri == "/home/me/x"


def test_an_unknown_user() -> None:
    with pytest.raises(ConfigError, match="~no-such-user/x: this machine has no home folder"):
        open_storage("~no-such-user/x")
