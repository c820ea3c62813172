"""Named places at which a test can kill this process, make it hang or fail, or give it notice. Inert unless armed:

    TERCET_CRASH="at=before_commit rank=1 step=8 do=kill once=/tmp/fired"

`do` is kill (SIGKILL), notice (SIGTERM), raise (a TrainingError) or hang: for ever, or until the file named by
`until=/tmp/go` exists. `once` names a file that is created when the place fires; while it exists the place is inert, so
that a restart gets past. Separate several places with `;`.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tercet.errors import TrainingError

VARIABLE = "TERCET_CRASH"


def limit(name: str) -> int | None:
    """Return the number of tokens above which memory is said to be out at this place; None if there is no limit.

    Armed by `at=longest_batch tokens=1000`, on all ranks; with `rank=1` on that one only."""
    for text in os.environ.get(VARIABLE, "").split(";"):
        armed = dict(item.split("=", 1) for item in text.split())
        rank = os.environ.get("RANK", "0")
        if armed.get("at") == name and "tokens" in armed and armed.get("rank", rank) == rank:
            return int(armed["tokens"])
    return None


def crash_point(name: str, step: int | None = None) -> None:
    """Do what the environment asks for at this place, step and rank."""
    if VARIABLE not in os.environ:
        return
    for text in os.environ[VARIABLE].split(";"):
        armed = dict(item.split("=", 1) for item in text.split())
        here = armed["at"] == name and armed.get("rank", "0") == os.environ.get("RANK", "0")
        if here and (step is None or int(armed.get("step", step)) == step):
            _fire(armed)


def _fire(armed: dict[str, str]) -> None:
    try:
        Path(armed["once"]).touch(exist_ok=False)
    except FileExistsError:
        return
    if armed.get("do") == "raise":
        raise TrainingError(f"a test asked for this error at {armed['at']}")
    if armed.get("do") != "hang":
        os.kill(os.getpid(), signal.SIGTERM if armed.get("do") == "notice" else signal.SIGKILL)
        return
    while "until" not in armed or not Path(armed["until"]).exists():
        time.sleep(0.05)
