"""`tercet train` with its one worker in the driver's own process, which is quicker where Ray is not what is tested.

python train_without_ray.py train RECIPE ...
"""

from __future__ import annotations

import sys

from tercet import launch
from tercet.checkpoint import Commit
from tercet.cli import main
from tercet.evaluation import evaluate_test
from tercet.plan import TrainPlan
from tercet.sections import WorkersConfig
from tercet.worker import run_worker


def _start_nothing(workers: WorkersConfig) -> None:
    assert workers.num_workers == 1


def _evaluate(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    return {"baseline": evaluate_test(plan, None), "best": evaluate_test(plan, commit)}


if __name__ == "__main__":
    launch.start_ray = _start_nothing
    launch.with_devices = lambda plan: plan
    launch.train = run_worker
    launch.evaluate_test = _evaluate
    sys.exit(main())
