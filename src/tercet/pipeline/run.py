"""The life of a run: survey storage, plan, train, evaluate on the test split, publish, report."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from typing import Any

from tercet.artifacts import journal
from tercet.artifacts.best import best_whole, publish_best
from tercet.artifacts.checkpoint import Commit, read_commits
from tercet.artifacts.journal import Events
from tercet.artifacts.lease import read_attempts
from tercet.artifacts.report import Metrics, RunMetrics, RunReport, html
from tercet.artifacts.throughput import Throughput
from tercet.artifacts.training_log import Evaluation, TrainingLog
from tercet.cluster import devices, session, train
from tercet.config.experiment import NON_EXPERIMENT_SECTIONS
from tercet.config.recipe import Config, as_yaml
from tercet.errors import CorruptObject, LearnedNothing, ObjectNotFound, StorageError, TrainingError
from tercet.evaluation.evaluate import measuring_precision
from tercet.pipeline.model_card import model_card
from tercet.planning.plan import TrainPlan
from tercet.planning.survey import read_report, survey
from tercet.storage import Storage, layout
from tercet.storage.base import retries as storage_retries
from tercet.storage.documents import seal, unseal

logger = logging.getLogger("tercet")


def run(config: Config, run_id: str | None = None) -> RunReport:
    """Train, evaluate and publish. A run that was interrupted resumes; one that has finished returns its report.

    Raises what ended the run, after a report of the failure is written."""
    storage, plan = survey(config, run_id)
    earlier_report = read_report(storage, plan.run_id)
    if earlier_report is not None and earlier_report.status == "finished":
        return earlier_report
    storage.put(layout.plan_key(plan.run_id), seal(plan))
    events = Events(storage, plan.run_id)
    try:
        with events.timed("start") as details:
            session.start_ray(plan.config.workers)
            plan = plan.model_copy(update={"config": session.with_devices(plan.config, details.update)})
            plan = _with_gpu_memory(storage, plan)
        with events.timed("train"):
            if not storage.exists(layout.training_key(plan.run_id)):  # written last by the workers
                train.train(plan)
        with events.timed("test"):
            evaluations = _evaluations(storage, plan)
            best = _best(storage, plan, evaluations, events)
            test_metrics = train.evaluate_test(plan, best)
        with events.timed("publish"):
            metrics = _metrics(evaluations, best.step, test_metrics, measuring_precision(plan, storage))
            log = _training_log(storage, plan.run_id)
            plan = _as_trained(plan, log)
            _publish(storage, plan, best, metrics, log.log_history)
        report = _report(storage, plan, events, metrics=metrics, throughput=log.throughput)
    except BaseException as error:
        with contextlib.suppress(StorageError):  # storage may be what failed
            _write(
                storage, _report(storage, plan, events, error=error, throughput=_throughput(storage, plan)), [], plan
            )
            events.add("run failed", error=str(error) or type(error).__name__)
        raise
    _write(storage, report, log.log_history, plan)
    events.add("run finished")
    return report


def _with_gpu_memory(storage: Storage, plan: TrainPlan) -> TrainPlan:
    """Choose `parallelism: auto` again by the memory of the cluster's GPUs, if Ray knows their type.

    The plan was made before Ray was joined. Raises PlanError if no mode fits."""
    workers = plan.config.workers
    is_open = workers.parallelism == "auto" and workers.memory_gib_per_worker is None
    if workers.use_gpu is not True or not is_open or (memory_bytes := devices.gpu_bytes()) is None:
        return plan
    _, again = survey(plan.config, plan.run_id, gpu_bytes=memory_bytes)
    names = ("parallelism", "parallelism_reason", "memory", "memory_bytes_available")
    plan = plan.model_copy(update={name: getattr(again, name) for name in names})
    storage.put(layout.plan_key(plan.run_id), seal(plan))
    return plan


def _evaluations(storage: Storage, plan: TrainPlan) -> list[dict[str, float]]:
    """Read all evaluations on the eval split; the first is the baseline."""
    keys = [layout.evaluation_key(plan.run_id, step) for step in plan.evaluation_steps]
    hint = "Train again with another --run-id."
    return [unseal(Evaluation, storage.read(key), storage.uri_of(key), hint).entry() for key in keys]


def _training_log(storage: Storage, run_id: str) -> TrainingLog:
    key = layout.training_key(run_id)
    return unseal(TrainingLog, storage.read(key), storage.uri_of(key), "Delete it: the same command writes it again.")


def _best(storage: Storage, plan: TrainPlan, evaluations: list[dict[str, float]], events: Events) -> Commit:
    """Return the best undamaged checkpoint. Reports an incident if it is not the one with the best evaluation."""
    best = best_whole(storage, read_commits(storage, plan.run_id), plan.metric)
    if best is None:
        raise TrainingError(
            "the training ended without an undamaged checkpoint that was evaluated",
            hint="look at the workers' logs; another --run-id trains again from the start",
        )
    best_step = max(evaluations[1:], key=lambda evaluation: evaluation[plan.metric])["step"]
    if best.step != best_step:
        message = f"the best checkpoint, of step {best_step}, is lost; the one of step {best.step} is used instead"
        logger.error("%s", message)
        journal.report_incident(storage, plan.run_id, f"best-{best_step}", "best_checkpoint_lost", message)
        events.add("best checkpoint lost", step=best_step, taken_step=best.step)
    return best


def _metrics(
    evaluations: list[dict[str, float]], best_step: int, test: dict[str, Metrics], test_precision: str | None = None
) -> RunMetrics:
    """Collect the run's metrics. Raises LearnedNothing if every evaluation equals the baseline in every digit.

    On a GPU, two evaluations of the same weights differ in the last digits, because sums are made in any order. There
    only the guard on the weights notices a run that learns nothing, in its first steps."""

    def values(entry: dict[str, float]) -> Metrics:
        return {name: value for name, value in entry.items() if name not in ("step", "epoch")}

    if all(values(entry) == values(evaluations[0]) for entry in evaluations[1:]):
        raise LearnedNothing(
            f"all {len(evaluations)} evaluations are equal in every digit: nothing was learned",
            hint="is the model frozen, or the learning rate 0? This run has ended; another --run-id trains again",
        )
    return RunMetrics(
        baseline_eval=values(evaluations[0]),
        baseline_test=test["baseline"],
        evaluations=tuple(evaluations),
        best_step=best_step,
        best_eval=values(next(entry for entry in evaluations if entry["step"] == best_step)),
        best_test=test["best"],
        test_precision=test_precision,
    )


def _as_trained(plan: TrainPlan, log: TrainingLog) -> TrainPlan:
    """Return the plan with the precision that the run computed in, where its recipe names none. The model card and the
    report show it."""
    training = plan.config.training
    if training.precision is not None:
        return plan
    training = training.model_copy(update={"precision": log.precision})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"training": training})})


def _publish(
    storage: Storage, plan: TrainPlan, best: Commit, metrics: RunMetrics, log_history: list[dict[str, Any]]
) -> None:
    # A model card may become public, so it does not say where the run was stored or on which machines it ran.
    public_recipe = as_yaml(plan.config, exclude=set(NON_EXPERIMENT_SECTIONS))
    publish_best(storage, plan.run_id, best, model_card(plan, metrics, log_history, public_recipe))
    storage.put(layout.metrics_key(plan.run_id), seal(metrics))


def _throughput(storage: Storage, plan: TrainPlan) -> Throughput | None:
    """Return the throughput up to the newest checkpoint; None if there is none."""
    commits = read_commits(storage, plan.run_id)
    return commits[0].throughput if commits else None


def _report(
    storage: Storage,
    plan: TrainPlan,
    events: Events,
    metrics: RunMetrics | None = None,
    error: BaseException | None = None,
    throughput: Throughput | None = None,
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
        run_uri=storage.uri_of(layout.run_prefix(plan.run_id)),
        best_uri=None if metrics is None else storage.uri_of(layout.best_prefix(plan.run_id)),
        throughput=throughput,
    )


def _incidents(storage: Storage, run_id: str) -> dict[str, int]:
    """Count incidents by kind. Storage retries are those of this process, and of rank 0 in the last attempt."""
    counts = journal.counts(storage, run_id)
    retries = Counter(storage_retries)
    with contextlib.suppress(ObjectNotFound, CorruptObject):  # a damaged log is no reason to write no report
        retries.update(_training_log(storage, run_id).storage_retries)
    return {**counts, **({"storage_retried": retries.total()} if retries else {})}


def _write(storage: Storage, report: RunReport, log_history: list[dict[str, Any]], plan: TrainPlan) -> None:
    page = html(report, log_history, as_yaml(plan.config))
    storage.put(layout.report_page_key(plan.run_id), page.encode())
    storage.put(layout.report_key(plan.run_id), seal(report))
