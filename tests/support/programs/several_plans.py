"""A worker for several plans in turn, because most of a tiny run is the start of the process.

python several_plans.py PLAN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from tercet.planning.plan import TrainPlan
from tercet.training.worker import run_worker

if __name__ == "__main__":
    for path in sys.argv[1:]:
        run_worker(TrainPlan.model_validate_json(Path(path).read_text(encoding="utf-8")))
