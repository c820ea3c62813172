"""What storage holds for a recipe: dataset versions, the champion, a run's plan → `TrainPlan`. Writes nothing."""

from __future__ import annotations

import datetime
import os

from tercet.champion import read_champion
from tercet.config import Config
from tercet.errors import ConfigError, CorruptObject, ObjectNotFound
from tercet.manifest import Manifest, read_manifest
from tercet.model_source import locate, read_facts
from tercet.packing_facts import read_packing_facts
from tercet.plan import PlannedChampion, TrainPlan, make_plan, make_run_id
from tercet.registry import resolve
from tercet.sealed import unseal
from tercet.storage import Storage, open_storage


def survey(config: Config, run_id: str | None = None, today: datetime.date | None = None) -> tuple[Storage, TrainPlan]:
    """Look at storage and derive the plan. Starts nothing and writes nothing.

    The memory of CPU workers is taken for this machine's, shared among them. That is right for a Ray of this machine
    alone; on a cluster it is a guess, which `workers.memory_gib_per_worker` replaces."""
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    manifest, *mix = [read_manifest(storage, part.name, part.version) for part in (config.dataset, *config.mix)]
    folder = locate(config.model)
    today = today or datetime.datetime.now(datetime.timezone.utc).date()
    memory_bytes = _physical_memory_bytes()
    share = None if memory_bytes is None else memory_bytes // config.workers.num_workers
    manifests = (manifest, *mix)
    run_id = run_id or make_run_id(config, [found.version for found in manifests], today)
    champion = planned_champion(storage, config, run_id)
    seen = [_seen(storage, champion, found) for found in manifests]
    facts = read_facts(folder) if folder else None
    packing_facts = read_packing_facts(config, folder)
    return storage, make_plan(config, manifest, facts, today, run_id, share, mix, champion, seen, packing_facts)


def planned_champion(storage: Storage, config: Config, run_id: str) -> PlannedChampion | None:
    """The champion, where the recipe asks for it: of a run that was started before, the one that it was started with.
    Raises what `registry.resolve` raises."""
    parts = (config.dataset, *config.mix)
    if config.model.start_from == "base" and all(part.replay is None for part in parts):
        return None
    if storage.exists(plan_key(run_id)):
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


def _seen(storage: Storage, champion: PlannedChampion | None, manifest: Manifest) -> Manifest | None:
    version = champion.dataset_versions.get(manifest.dataset) if champion else None
    return read_manifest(storage, manifest.dataset, version) if version else None


def _physical_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return None


def list_runs(storage: Storage) -> list[str]:
    """The ids of all runs that were started, newest first."""
    return sorted({key.split("/")[1] for key in storage.list("runs") if key.endswith("/plan.json")}, reverse=True)


def read_plan(storage: Storage, run_id: str) -> TrainPlan:
    """The plan of a run that was started. Raises ConfigError when there is no such run, CorruptObject when its plan is
    damaged, or of another run or version of tercet."""
    uri = storage.uri_of(plan_key(run_id))
    try:
        plan = unseal(TrainPlan, storage.read(plan_key(run_id)), uri, hint="choose a new --run-id")
    except ObjectNotFound:
        raise unknown_run(storage, run_id) from None
    if plan.run_id != run_id:
        raise CorruptObject(f"{uri} is the plan of run {plan.run_id}", hint="choose a new --run-id")
    return plan


def unknown_run(storage: Storage, run_id: str) -> ConfigError:
    """To raise for a run that was never started."""
    known = ", ".join(list_runs(storage)[:5]) or "none"
    return ConfigError(f"run {run_id} does not exist in {storage.uri}", hint=f"runs here: {known}")


def plan_key(run_id: str) -> str:
    """Where the plan of a run lies."""
    return f"runs/{run_id}/plan.json"


def check_same_experiment(storage: Storage, plan: TrainPlan) -> None:
    """Raises ConfigError when the run id belongs to another recipe, or to another version of one of its datasets."""
    if not storage.exists(plan_key(plan.run_id)):
        return
    earlier = read_plan(storage, plan.run_id)
    same = earlier.config.experiment_hash() == plan.config.experiment_hash()
    if not same or [part.version for part in earlier.datasets] != [part.version for part in plan.datasets]:
        raise ConfigError(
            f"run {plan.run_id} exists with another {'dataset version' if same else 'recipe'}",
            hint="leave --run-id away, or choose a new one",
        )
