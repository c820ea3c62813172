"""`tercet train` with its one worker in the driver's process, which is faster for tests that are not about Ray.

python train_without_ray.py train RECIPE ...
"""

from __future__ import annotations

import sys

from tercet.artifacts.checkpoint import Commit
from tercet.cli.main import main
from tercet.cluster import session, train
from tercet.config.sections import WorkersConfig
from tercet.evaluation.evaluate import evaluate_test
from tercet.planning.plan import TrainPlan
from tercet.training.worker import run_worker


def _start_nothing(workers: WorkersConfig) -> None:
    assert workers.num_workers == 1


def _evaluate(plan: TrainPlan, commit: Commit) -> dict[str, dict[str, float]]:
    return {"baseline": evaluate_test(plan, None), "best": evaluate_test(plan, commit)}


if __name__ == "__main__":
    session.start_ray = _start_nothing
    session.with_devices = lambda config, *_: config
    train.train = run_worker
    train.evaluate_test = _evaluate
    sys.exit(main())
