"""Read what storage holds for a recipe (dataset versions, champion, plan of the run) and derive the `TrainPlan`.

Nothing is written. plan.json and champion.json are read once each.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tercet.artifacts.champion import read_champion
from tercet.artifacts.precision import check_same_precision
from tercet.artifacts.registry import version_of
from tercet.artifacts.report import RunReport
from tercet.config.recipe import Config
from tercet.config.sections import DatasetConfig
from tercet.data.manifest import Manifest
from tercet.data.versions import read_manifest
from tercet.errors import ConfigError, CorruptObject, ObjectNotFound, PlanError, first_line
from tercet.planning import gpus
from tercet.planning.dataset_plan import FoundDataset
from tercet.planning.model_files import locate, read_facts
from tercet.planning.packing import read_packing_facts
from tercet.planning.plan import ENGINE, Findings, PlannedChampion, TrainPlan, check_engine, make_plan, make_run_id
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import unseal

logger = logging.getLogger("tercet")

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
RESUMED_FOR_DAYS = 7  # after its start; an older run is resumed by its --run-id only


def survey(
    config: Config,
    run_id: str | None = None,
    today: datetime.date | None = None,
    gpu_bytes: int | None = None,
) -> tuple[Storage, TrainPlan]:
    """Read storage and derive the plan of a run: run `run_id`, or the run that starts on the UTC date `today`.

    Without both, it is the unfinished run of this recipe and data (see `find_run`), or else a new one. A run that was
    started before keeps its engine and its champion.

    The memory of a CPU worker is taken to be an equal share of this machine's, and that of a GPU to be `gpu_bytes`, or
    that of this machine's smallest. That is right for a Ray cluster of this machine alone; on other clusters it is a
    guess, and `workers.memory_gib_per_worker` replaces it.

    Raises ConfigError for an impossible run id, or one that belongs to another recipe or other data; PlanError if the
    plan cannot work, or this tercet cannot resume the run; CorruptObject if the run's plan is damaged."""
    if run_id is not None and not RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{run_id!r} cannot be a run id", hint="use letters, digits, `.`, `_` and `-`, at most 200 characters"
        )
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    parts = (config.dataset, *config.mix)
    manifests = [read_manifest(storage, part.name, part.version) for part in parts]
    versions = [manifest.version for manifest in manifests]
    if run_id is None and today is None:
        run_id, earlier = find_run(storage, config, versions, datetime.datetime.now(datetime.UTC).date())
    else:
        run_id = run_id or make_run_id(config, versions, today or datetime.date.min)
        earlier = find_plan(storage, run_id)
    if earlier is not None:
        _check_same_experiment(earlier, config, versions)
        _check_resumable(storage, earlier)
        check_same_precision(storage, earlier.run_id, config.training.precision)
    champion = _planned_champion(storage, config, earlier)
    model_dir = locate(config.model)
    findings = Findings(
        run_id=run_id,
        datasets=tuple(
            FoundDataset(part, manifest, _champion_manifest(storage, champion, part))
            for part, manifest in zip(parts, manifests, strict=True)
        ),
        model=read_facts(model_dir) if model_dir else None,
        packing=read_packing_facts(config, model_dir),
        cpu_worker_bytes=_bytes_per_worker(config.workers.num_workers),
        has_fused_attention=os.environ.get("TERCET_FUSED_ATTENTION") == "1",  # see model/fused_attention.py
        gpu_bytes=None if config.workers.use_gpu is False else gpu_bytes or gpus.bytes_of_this_machine(),
        champion=champion,
        engine=ENGINE if earlier is None else earlier.engine,
    )
    return storage, make_plan(config, findings)


def find_run(
    storage: Storage, config: Config, dataset_versions: Sequence[str], today: datetime.date
) -> tuple[str, TrainPlan | None]:
    """Return the id of the run to work on, and its plan if it was started before.

    This is the newest run of this recipe on this data, if it was started at most RESUMED_FOR_DAYS ago and has not
    finished: a run that crashed before midnight UTC is resumed after it. Otherwise it is today's run. Raises
    CorruptObject if the plan of today's run is damaged; an older damaged run is not resumed."""
    todays = make_run_id(config, dataset_versions, today)
    for num_days in range(RESUMED_FOR_DAYS + 1):
        run_id = make_run_id(config, dataset_versions, today - datetime.timedelta(days=num_days))
        try:
            plan = find_plan(storage, run_id)
        except CorruptObject:
            if num_days == 0:
                raise
            return todays, None
        if plan is None:
            continue
        if num_days == 0:
            return todays, plan
        if _is_finished(storage, run_id):
            return todays, None
        logger.warning("resuming run %s, which has no result yet; to start another run, give a new --run-id", run_id)
        return run_id, plan
    return todays, None


def _check_same_experiment(earlier: TrainPlan, config: Config, dataset_versions: Sequence[str]) -> None:
    """Raise ConfigError if the run was started with another recipe, or with another version of one of its datasets."""
    is_same_recipe = earlier.config.experiment_hash() == config.experiment_hash()
    if not is_same_recipe or [part.version for part in earlier.datasets] != list(dataset_versions):
        raise ConfigError(
            f"run {earlier.run_id} exists with another {'dataset version' if is_same_recipe else 'recipe'}",
            hint="omit --run-id, or choose a new one",
        )


def _check_resumable(storage: Storage, earlier: TrainPlan) -> None:
    """Raise PlanError if this tercet cannot compute what the run's engine would. A finished run needs no computing."""
    try:
        check_engine(earlier.engine, earlier.run_id)
    except PlanError:
        if not _is_finished(storage, earlier.run_id):
            raise


def _is_finished(storage: Storage, run_id: str) -> bool:
    report = read_report(storage, run_id)
    return report is not None and report.status == "finished"


def _planned_champion(storage: Storage, config: Config, earlier: TrainPlan | None) -> PlannedChampion | None:
    """The champion, if the recipe needs one; for a run that was started before, the one that it was started with."""
    parts = (config.dataset, *config.mix)
    if config.model.start_from == "base" and all(part.replay is None for part in parts):
        return None
    if earlier is not None:
        return earlier.champion
    champion = read_champion(storage, config.name)
    if champion is None:
        return None
    version = version_of(storage, champion)
    return PlannedChampion(
        generation=champion.generation,
        version=version.number,
        commit=version.commit,
        dataset_versions=version.lineage.dataset_versions,
    )


def _champion_manifest(storage: Storage, champion: PlannedChampion | None, part: DatasetConfig) -> Manifest | None:
    """The version of a dataset that the champion was trained on, if the recipe replays old rows."""
    version = champion.dataset_versions.get(part.name) if champion and part.replay else None
    return read_manifest(storage, part.name, version) if version else None


def _bytes_per_worker(num_workers: int) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_workers
    except (AttributeError, ValueError, OSError):  # the operating system does not say
        return None


def list_runs(storage: Storage) -> list[str]:
    """Return the ids of all runs that were started, newest first."""
    return layout.run_ids(storage.list(layout.RUNS))[::-1]


def read_plan(storage: Storage, run_id: str) -> TrainPlan:
    """Return the plan of a run that was started.

    Raises ConfigError if there is no such run, and otherwise as `find_plan`."""
    plan = find_plan(storage, run_id)
    if plan is None:
        raise unknown_run(storage, run_id)
    return plan


def find_plan(storage: Storage, run_id: str) -> TrainPlan | None:
    """Return the plan of a run; None if it was never started.

    Raises CorruptObject if the plan is damaged or that of another run, PlanError if a newer tercet made it."""
    uri = storage.uri_of(layout.plan_key(run_id))
    try:
        plan = unseal(TrainPlan, storage.read(layout.plan_key(run_id)), uri, hint="choose a new --run-id")
    except ObjectNotFound:
        return None
    if plan.run_id != run_id:
        raise CorruptObject(f"{uri} is the plan of run {plan.run_id}", hint="choose a new --run-id")
    return plan


def plan_of_file(path: Path) -> TrainPlan:
    """Read a plan that `tercet plan --json` printed to a file.

    Raises ConfigError for anything else, PlanError if a newer tercet made it."""
    try:
        return TrainPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"{path} is not a plan: {first_line(error)}"
        raise ConfigError(what, hint="make one: tercet plan RECIPE --json > plan.json") from None


def unknown_run(storage: Storage, run_id: str) -> ConfigError:
    """Return the error to raise for a run that was never started."""
    known = ", ".join(list_runs(storage)[:5]) or "none"
    return ConfigError(f"run {run_id} does not exist in {storage.uri}", hint=f"runs there: {known}")


def read_report(storage: Storage, run_id: str) -> RunReport | None:
    """Return the report of a run that ended, else None. None for a damaged one too: repeating the run rewrites it."""
    try:
        key = layout.report_key(run_id)
        return unseal(RunReport, storage.read(key), storage.uri_of(key))
    except (ObjectNotFound, CorruptObject):
        return None
