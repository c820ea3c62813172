"""The life of a run: config → survey storage → plan → workers → evaluation → publish → report."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from tercet import incidents, launch
from tercet.best import best_whole, publish_best
from tercet.checkpoint import Commit, read_commits
from tercet.config import NOT_OF_THE_EXPERIMENT, Config
from tercet.errors import CorruptObject, LearnedNothing, ObjectNotFound, StorageError, TrainingError
from tercet.lease import read_attempts
from tercet.model_card import model_card
from tercet.page import html
from tercet.plan import TrainPlan
from tercet.report import Metrics, RunMetrics, RunReport, as_json
from tercet.sealed import seal
from tercet.storage import Storage
from tercet.storage import retries as storage_retries
from tercet.survey import check_same_experiment, plan_key, read_report, survey
from tercet.worker import evaluation_key, training_key

logger = logging.getLogger("tercet")

_LAST_EVENTS = ("run finished", "run failed")


class Events:
    """The run's events.jsonl: what happened, when, and how long each stage took. Written whole at every event, because
    object storage has no append."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._storage, self._key = storage, f"runs/{run_id}/events.jsonl"
        self.seconds: dict[str, float] = {}
        self.stage = "plan"
        try:
            self._lines = storage.read(self._key).decode().splitlines()
            last = json.loads(self._lines[-1])["event"] if self._lines else None
        except ObjectNotFound:
            self._lines, last = [], None
        except (CorruptObject, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is damaged and begun anew: %s", storage.uri_of(self._key), error)
            self._lines, last = [], None
        if last is not None and last not in _LAST_EVENTS:
            message = "an earlier start of this run ended without a word"
            incidents.tell(storage, run_id, f"driver-{len(self._lines)}", "driver_lost", message)

    def add(self, event: str, **details: Any) -> None:
        """Record that something happened now."""
        self._lines.append(json.dumps({"unix_seconds": round(time.time(), 3), "event": event, **details}))
        self._storage.put(self._key, ("\n".join(self._lines) + "\n").encode())

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the start and the end of a stage."""
        self.stage = stage
        self.add(f"{stage} started")
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started
        self.add(f"{stage} finished", seconds=round(self.seconds[stage], 3))


def run(config: Config, run_id: str | None = None) -> RunReport:
    """Train, evaluate and publish; or return the result, if this run finished before; or go on where it stopped.

    Raises what ended it, after a report of the failure is written."""
    storage, plan = survey(config, run_id)
    check_same_experiment(storage, plan)
    if (finished := read_report(storage, plan.run_id)) is not None and finished.status == "finished":
        return finished
    storage.put(plan_key(plan.run_id), seal(plan))
    events = Events(storage, plan.run_id)
    try:
        with events.timed("start"):
            launch.start_ray(plan.config.workers)
            plan = plan.model_copy(update={"config": launch.with_devices(plan.config)})
        with events.timed("train"):
            if not storage.exists(training_key(plan.run_id)):  # written last by the workers
                launch.train(plan)
        with events.timed("test"):
            best = _best(storage, plan, events)
            test = launch.evaluate_test(plan, best)
        with events.timed("publish"):
            metrics = _metrics(_evaluations(storage, plan), best.step, test)
            log_history = json.loads(storage.read(training_key(plan.run_id)))["log_history"]
            # Where it was stored and on what it ran is not a reader's business: a card may become public.
            public_recipe = recipe(plan.config, exclude=set(NOT_OF_THE_EXPERIMENT))
            publish_best(storage, plan.run_id, best, model_card(plan, metrics, log_history, public_recipe))
            storage.put(f"runs/{plan.run_id}/metrics.json", as_json(metrics))
        report = _report(storage, plan, events, metrics=metrics)
    except BaseException as error:
        with contextlib.suppress(StorageError):  # storage may be what failed
            _write(storage, _report(storage, plan, events, error=error), [], plan)
            events.add("run failed", error=str(error) or type(error).__name__)
        raise
    _write(storage, report, log_history, plan)
    events.add("run finished")
    return report


def _best(storage: Storage, plan: TrainPlan, events: Events) -> Commit:
    """The best checkpoint that is whole. That it is not the one with the best evaluation is told."""
    best = best_whole(storage, read_commits(storage, plan.run_id), plan.metric)
    if best is None:
        raise TrainingError(
            "the training ended without a whole checkpoint that was evaluated",
            hint="look at the workers' logs; another --run-id trains anew",
        )
    evaluated = max(_evaluations(storage, plan)[1:], key=lambda evaluation: evaluation[plan.metric])
    if best.step != evaluated["step"]:
        message = f"the best checkpoint, of step {evaluated['step']}, is lost; that of step {best.step} is taken"
        logger.error("%s", message)
        incidents.tell(storage, plan.run_id, f"best-{evaluated['step']}", "best_checkpoint_lost", message)
        events.add("best checkpoint lost", step=evaluated["step"], taken_step=best.step)
    return best


def recipe(config: Config, exclude: set[str] | None = None) -> str:
    """The whole recipe as YAML, defaults included, without the sections named in `exclude`."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude=exclude), sort_keys=False, allow_unicode=True)


def _evaluations(storage: Storage, plan: TrainPlan) -> list[dict[str, float]]:
    return [json.loads(storage.read(evaluation_key(plan.run_id, step))) for step in plan.evaluation_steps]


def _metrics(evaluations: list[dict[str, float]], best_step: int, test: dict[str, Metrics]) -> RunMetrics:
    """Raises LearnedNothing when no evaluation differs from the baseline in any digit."""

    def values(entry: dict[str, float]) -> Metrics:
        return {name: value for name, value in entry.items() if name not in ("step", "epoch")}

    if all(values(entry) == values(evaluations[0]) for entry in evaluations[1:]):
        raise LearnedNothing(
            f"all {len(evaluations)} evaluations are equal in every digit: nothing was learned",
            hint="is the model frozen, or the learning rate 0? This run is over: another --run-id trains anew",
        )
    return RunMetrics(
        baseline_eval=values(evaluations[0]),
        baseline_test=test["baseline"],
        evaluations=tuple(evaluations),
        best_step=best_step,
        best_eval=values(next(entry for entry in evaluations if entry["step"] == best_step)),
        best_test=test["best"],
    )


def _report(
    storage: Storage,
    plan: TrainPlan,
    events: Events,
    metrics: RunMetrics | None = None,
    error: BaseException | None = None,
) -> RunReport:
    attempts = read_attempts(storage, plan.run_id)
    return RunReport(
        run_id=plan.run_id,
        status="finished" if error is None else "failed",
        failed_stage=None if error is None else events.stage,
        error=None if error is None else str(error) or type(error).__name__,
        name=plan.config.name,
        dataset=plan.config.dataset.name,
        dataset_version=plan.dataset_version,
        mix=plan.shares,
        num_rows=plan.num_rows,
        num_workers=attempts[-1].world_size if attempts else plan.config.workers.num_workers,
        num_attempts=max(len(attempts), 1),
        incidents=_incidents(storage, plan.run_id),
        metric=plan.metric,
        num_steps=plan.num_steps,
        metrics=metrics,
        seconds={stage: round(seconds, 2) for stage, seconds in events.seconds.items()},
        run_uri=storage.uri_of(f"runs/{plan.run_id}"),
        best_uri=None if metrics is None else storage.uri_of(f"runs/{plan.run_id}/best"),
    )


def _incidents(storage: Storage, run_id: str) -> dict[str, int]:
    """By kind. Of storage's, those of rank 0 in the last attempt, and of this process."""
    found = incidents.counts(storage, run_id)
    retries = Counter(storage_retries)
    with contextlib.suppress(ObjectNotFound):
        retries.update(json.loads(storage.read(training_key(run_id)))["storage_retries"])
    return {**found, **({"storage_retried": retries.total()} if retries else {})}


def _write(storage: Storage, report: RunReport, log_history: list[dict[str, Any]], plan: TrainPlan) -> None:
    page = html(report, log_history, recipe(plan.config))
    storage.put(f"runs/{plan.run_id}/report.html", page.encode())
    storage.put(f"runs/{plan.run_id}/report.json", as_json(report))
