"""A failpoint is inert unless armed, and fires once, at its place, step and rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tercet.failpoints import VARIABLE, crash_point

SCRIPT = "from tercet.failpoints import crash_point; crash_point('here', 3); print('alive')"


@pytest.mark.parametrize(
    ("armed", "rank", "dies"),
    [
        (None, None, False),
        ("at=here step=3", None, True),
        ("at=here", None, True),
        ("at=there step=3", None, False),
        ("at=here step=4", None, False),
        ("at=here step=3 rank=1", None, False),
        ("at=here step=3 rank=1", "1", True),
        ("at=here step=3", "1", False),
        ("at=there once=/nowhere;at=here step=3", None, True),
    ],
)
def test_it_fires_where_it_is_armed(tmp_path: Path, armed: str | None, rank: str | None, dies: bool) -> None:
    once = tmp_path / "fired"
    environment = dict(os.environ)
    environment |= {} if armed is None else {VARIABLE: f"{armed} once={once}"}
    environment |= {} if rank is None else {"RANK": rank}
    for died in (dies, False):  # and never again
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=False)
        assert done.returncode == (-signal.SIGKILL if died else 0), done.stderr
        assert once.exists() == dies


def test_a_hang_ends_when_its_file_appears(tmp_path: Path) -> None:
    fired, go = tmp_path / "fired", tmp_path / "go"
    environment = {**os.environ, VARIABLE: f"at=here do=hang until={go} once={fired}"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while not fired.exists():
                assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
            go.touch()
            assert process.communicate(timeout=60)[0] == "alive\n"
        finally:
            process.kill()


def test_an_unarmed_failpoint_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    crash_point("anything", 1)
