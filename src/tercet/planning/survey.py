"""What storage holds for a recipe: dataset versions, the champion, a run's plan → `TrainPlan`. Writes nothing."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tercet.artifacts.champion import read_champion
from tercet.artifacts.registry import resolve
from tercet.artifacts.report import RunReport
from tercet.config.recipe import Config
from tercet.data.manifest import Manifest
from tercet.data.versions import read_manifest
from tercet.errors import ConfigError, CorruptObject, ObjectNotFound, first_line
from tercet.planning.dataset_plan import FoundDataset
from tercet.planning.model_files import locate, read_facts
from tercet.planning.packing import read_packing_facts
from tercet.planning.plan import Findings, PlannedChampion, TrainPlan, make_plan, make_run_id
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import unseal

logger = logging.getLogger("tercet")

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
RESUMED_FOR_DAYS = 7  # from its start; an older one is gone on with by its --run-id


def survey(config: Config, run_id: str | None = None, today: datetime.date | None = None) -> tuple[Storage, TrainPlan]:
    """Look at storage and derive the plan. Starts nothing and writes nothing. Without `run_id` and `today`, it is that
    of the run of this recipe and data that did not get to its end, or else of a new one.

    The memory of CPU workers is taken for this machine's, shared among them. That is right for a Ray of this machine
    alone; on a cluster it is a guess, which `workers.memory_gib_per_worker` replaces."""
    if run_id is not None and not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"{run_id!r} cannot be a run id", hint="letters, digits, `.`, `_` and `-`, at most 200")
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    parts = (config.dataset, *config.mix)
    manifests = [read_manifest(storage, part.name, part.version) for part in parts]
    model_dir = locate(config.model)
    versions = [manifest.version for manifest in manifests]
    if today is None:
        today = datetime.datetime.now(datetime.UTC).date()
        run_id = run_id or unfinished_run(storage, config, versions, today)
    run_id = run_id or make_run_id(config, versions, today)
    champion = planned_champion(storage, config, run_id)
    findings = Findings(
        run_id=run_id,
        datasets=tuple(
            FoundDataset(part, manifest, _champion_manifest(storage, champion, manifest))
            for part, manifest in zip(parts, manifests, strict=True)
        ),
        model=read_facts(model_dir) if model_dir else None,
        packing=read_packing_facts(config, model_dir),
        cpu_worker_bytes=_bytes_per_worker(config.workers.num_workers),
        champion=champion,
    )
    return storage, make_plan(config, findings)


def unfinished_run(
    storage: Storage, config: Config, dataset_versions: Sequence[str], today: datetime.date
) -> str | None:
    """The newest run of this recipe on this data that was started in the last week, if it has no result: a crash before
    midnight UTC is resumed after it. None where the newest has one, or a damaged plan, or there is none."""
    for num_days in range(RESUMED_FOR_DAYS + 1):
        run_id = make_run_id(config, dataset_versions, today - datetime.timedelta(days=num_days))
        if storage.exists(layout.plan_key(run_id)):
            if not _can_go_on(storage, run_id):
                return None
            if num_days > 0:
                logger.warning("going on with run %s, which has no result yet; --run-id starts another", run_id)
            return run_id
    return None


def _can_go_on(storage: Storage, run_id: str) -> bool:
    try:
        read_plan(storage, run_id)
    except CorruptObject:
        return False
    report = read_report(storage, run_id)
    return report is None or report.status != "finished"


def planned_champion(storage: Storage, config: Config, run_id: str) -> PlannedChampion | None:
    """The champion, where the recipe asks for it: of a run that was started before, the one that it was started with.
    Raises what `registry.resolve` raises."""
    parts = (config.dataset, *config.mix)
    if config.model.start_from == "base" and all(part.replay is None for part in parts):
        return None
    if storage.exists(layout.plan_key(run_id)):
        return read_plan(storage, run_id).champion
    if read_champion(storage, config.name) is None:
        return None
    champion, version = resolve(storage, config.name)
    return PlannedChampion(
        generation=champion.generation,
        version=version.number,
        commit=version.commit,
        dataset_versions=version.lineage.dataset_versions,
    )


def _champion_manifest(storage: Storage, champion: PlannedChampion | None, manifest: Manifest) -> Manifest | None:
    version = champion.dataset_versions.get(manifest.dataset) if champion else None
    return read_manifest(storage, manifest.dataset, version) if version else None


def _bytes_per_worker(num_workers: int) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_workers
    except (AttributeError, ValueError, OSError):  # the operating system does not say
        return None


def list_runs(storage: Storage) -> list[str]:
    """The ids of all runs that were started, newest first."""
    return layout.run_ids(storage.list(layout.RUNS))[::-1]


def read_plan(storage: Storage, run_id: str) -> TrainPlan:
    """The plan of a run that was started. Raises ConfigError when there is no such run, CorruptObject when its plan is
    damaged, or of another run or version of tercet."""
    uri = storage.uri_of(layout.plan_key(run_id))
    try:
        plan = unseal(TrainPlan, storage.read(layout.plan_key(run_id)), uri, hint="choose a new --run-id")
    except ObjectNotFound:
        raise unknown_run(storage, run_id) from None
    if plan.run_id != run_id:
        raise CorruptObject(f"{uri} is the plan of run {plan.run_id}", hint="choose a new --run-id")
    return plan


def plan_of_file(path: Path) -> TrainPlan:
    """What `tercet plan --json` printed to a file. Raises ConfigError for anything else."""
    try:
        return TrainPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"{path} is not a plan: {first_line(error)}"
        raise ConfigError(what, hint="make one: tercet plan RECIPE --json > plan.json") from None


def unknown_run(storage: Storage, run_id: str) -> ConfigError:
    """To raise for a run that was never started."""
    known = ", ".join(list_runs(storage)[:5]) or "none"
    return ConfigError(f"run {run_id} does not exist in {storage.uri}", hint=f"runs here: {known}")


def read_report(storage: Storage, run_id: str) -> RunReport | None:
    """The report of a run that ended, or None. A damaged one is None too: repeating the run writes it anew."""
    try:
        return RunReport.model_validate_json(storage.read(layout.report_key(run_id)))
    except (ObjectNotFound, CorruptObject, ValueError):
        return None


def check_same_experiment(storage: Storage, plan: TrainPlan) -> None:
    """Raises ConfigError when the run id belongs to another recipe, or to another version of one of its datasets."""
    if not storage.exists(layout.plan_key(plan.run_id)):
        return
    earlier = read_plan(storage, plan.run_id)
    same = earlier.config.experiment_hash() == plan.config.experiment_hash()
    if not same or [part.version for part in earlier.datasets] != [part.version for part in plan.datasets]:
        raise ConfigError(
            f"run {plan.run_id} exists with another {'dataset version' if same else 'recipe'}",
            hint="leave --run-id away, or choose a new one",
        )
