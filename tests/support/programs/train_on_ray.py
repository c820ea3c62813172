"""The workers of several plans under Ray Train, one after the other in one local cluster.

python train_on_ray.py PLAN...
"""

from __future__ import annotations

import sys
from pathlib import Path

from tercet.cluster import session, train
from tercet.planning.plan import TrainPlan

if __name__ == "__main__":
    for path in sys.argv[1:]:
        plan = TrainPlan.model_validate_json(Path(path).read_text(encoding="utf-8"))
        session.start_ray(plan.config.workers)
        train.train(plan)
