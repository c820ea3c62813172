"""The worker prepares the environment of the libraries before it imports one of them."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "sentence_transformers", "datasets", "accelerate", "deepspeed", "peft"}


def test_importing_the_worker_imports_no_library() -> None:
    code = (
        "import json, sys\n"
        "from tercet.training.worker import notice_of_sigterm, run_worker\n"
        "notice_of_sigterm()\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & HEAVY == set()
