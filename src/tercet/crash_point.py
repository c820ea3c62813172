"""Named places at which a test can kill this process. Inert unless the environment arms one.

    TERCET_CRASH="at=before_commit rank=1 step=8 once=/tmp/fired"

`once` names a file that is made when it fires: where it exists, the place is inert again, so that a restart gets past.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "TERCET_CRASH"


def crash_point(name: str, step: int | None = None) -> None:
    """SIGKILL to this very process, if the environment asks for it at this place, step and rank."""
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
    os.kill(os.getpid(), signal.SIGKILL)
