"""A worker that prints how torch is set up after it has trained a plan.

python determinism.py PLAN
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tercet.planning.plan import TrainPlan
from tercet.training.worker import run_worker

if __name__ == "__main__":
    run_worker(TrainPlan.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    import torch

    state = {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    print(json.dumps(state))
