"""A program for the tests of forks: prints its surroundings, and ends as requested.

python shows_itself.py CODE [WAITS]    CODE: the exit code of rank 1, or of the lone process; WAITS: rank 0 waits first
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

RANK = os.environ.get("RANK", "1")
SHOWN = ("MADE_UP", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TERCET_CRASH")

if __name__ == "__main__":
    print(json.dumps({"cwd": str(Path.cwd()), "argv": sys.argv[1:], **{name: os.environ.get(name) for name in SHOWN}}))
    if RANK == "0" and len(sys.argv) > 2:
        time.sleep(600)
    if RANK == "1" and sys.argv[1] == "traceback":
        raise ValueError("as asked")
    sys.exit(int(sys.argv[1]) if RANK == "1" else 0)
