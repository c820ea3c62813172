"""Named places at which a test can kill this process, make it hang, or give it notice. Inert unless armed:

    TERCET_CRASH="at=before_commit rank=1 step=8 do=kill once=/tmp/fired"

`do` is kill (SIGKILL), hang or notice (SIGTERM); `once` names a file that is made when it fires: where it exists, the
place is inert again, so that a restart gets past.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

VARIABLE = "TERCET_CRASH"


def crash_point(name: str, step: int | None = None) -> None:
    """Does what the environment asks for at this place, step and rank."""
    if VARIABLE not in os.environ:
        return
    armed = dict(item.split("=", 1) for item in os.environ[VARIABLE].split())
    if armed["at"] != name or armed.get("rank", "0") != os.environ.get("RANK", "0"):
        return
    if step is not None and int(armed.get("step", step)) != step:
        return
    try:
        Path(armed["once"]).touch(exist_ok=False)
    except FileExistsError:
        return
    if armed.get("do") == "hang":
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGTERM if armed.get("do") == "notice" else signal.SIGKILL)
