"""One night: new rows in, a run, a comparison with the champion, and the champion kept or replaced.

A night is named by its run, and that by date, recipe and data. So two starts of one night are one run; a night that
died goes on when it is started again; one that is over says what came of it.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field

from tercet.artifacts.best import read_best
from tercet.artifacts.champion import Champion
from tercet.artifacts.decision import BASE_MODEL, CANDIDATE, GateDecision, Role, Verdict
from tercet.artifacts.registry import Promotion, promote, read_version
from tercet.cluster import session
from tercet.config.recipe import Config
from tercet.data.append import append
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.readers import find_sources
from tercet.data.versions import read_head, read_manifest
from tercet.errors import AlreadyExists, CorruptObject, ObjectNotFound
from tercet.evaluation.comparison import IndexImpact, compare, impact, means
from tercet.evaluation.label_check import label_warning
from tercet.evaluation.measurement import Measurement, Request, measure, read_measured
from tercet.pipeline.mining import mine, read_mined
from tercet.pipeline.publishers import notify
from tercet.pipeline.run import run
from tercet.planning.plan import TrainPlan
from tercet.planning.survey import survey
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import Document, seal, unseal

Outcome = Literal["promoted", "kept", "undecided", "refused", "nothing_to_do"]
OUTCOMES: dict[Verdict, Outcome] = {
    "promote": "promoted",
    "keep": "kept",
    "undecided": "undecided",
    "refused": "refused",
}
Say = Callable[[str], None]


class Night(Document):
    """What came of a night."""

    name: str
    date: datetime.date
    run_id: str
    experiment_hash: str
    dataset_versions: dict[str, str]
    outcome: Outcome
    sentence: str
    champion_before: int | None = None
    """Its generation; None where there was none."""
    champion: int | None = None
    """The generation that serves afterwards."""
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """On the test split: of the base model, the champion before and the candidate."""
    index_impact: IndexImpact | None = None
    warning: str | None = None
    """Of the new rows; it decides nothing."""
    unix_seconds: float
    """When it was over."""
    seconds: float
    """That its last start took."""


def night_of(now: datetime.datetime, begins_at_utc_hour: int) -> datetime.date:
    """The night that a moment belongs to, named by the UTC date on which it began."""
    return (now.astimezone(datetime.UTC) - datetime.timedelta(hours=begins_at_utc_hour)).date()


def nightly(config: Config, who: str, say: Say, now: datetime.datetime | None = None) -> Night:
    """Do a night, or go on with it, or return what came of it. `say` gets a line for a person before each stage.

    Raises whatever ends the run or the comparison; the champion is then as it was, and the next start goes on."""
    began = time.monotonic()
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    date = night_of(now or datetime.datetime.now(datetime.UTC), config.nightly.begins_at_utc_hour)
    say(f"data: {add_rows(config, storage)}")
    config = _with_mined_negatives(config, storage, say)
    _, plan = survey(config, today=date)
    night = read_night(storage, config.name, plan.run_id)
    if night is None and (before := _identical_night(storage, plan)) is not None:
        sentence = f"nothing is new since the night of {before.date}: the same recipe, the same data"
        night = _night(plan, date, began, "nothing_to_do", sentence)
    elif night is None:
        say(f"run: {plan.run_id}")
        run(_pinned(config, plan), plan.run_id)
        night = _gate_candidate(storage, plan, date, began, who, say)
        with contextlib.suppress(AlreadyExists):  # of another start of this night
            storage.put_if_absent(layout.night_key(plan.config.name, plan.run_id), seal(night))
    notify(storage, config, say)
    return night


def add_rows(config: Config, storage: Storage) -> str:
    """Bring the rows of new files to the dataset; what came of that, in words."""
    night, name = config.nightly, config.dataset.name
    sources = find_sources(night.sources, config.storage.endpoint_url)
    if not sources:
        return "no new files" if night.sources else "as it is in storage"
    options = IngestOptions(
        columns=night.columns,
        group=night.group,
        slices=night.slices,
        max_bad_rows=night.max_bad_rows,
        endpoint_url=config.storage.endpoint_url,
    )
    if read_head(storage, name) is None:
        num_rows = build_version(sources, storage, name, options).manifest.num_rows
        return f"a new dataset of {sum(num_rows.values()):,} rows"
    return append(sources, storage, name, options).text()


def _with_mined_negatives(config: Config, storage: Storage, say: Say) -> Config:
    """The recipe on the mined dataset, where it asks for one. A version is mined once: another model would find other
    negatives, and a night that is started again would be another run."""
    mining, dataset = config.nightly.mine, config.dataset
    if mining is None:
        return config
    into, source = f"{dataset.name}-mined", read_manifest(storage, dataset.name, dataset.version).version
    found = read_mined(storage, into, source, mining)
    if found is None:
        say(f"negatives: mining {dataset.name} {source}")
        pinned = config.model_copy(update={"dataset": dataset.model_copy(update={"version": source})})
        version = mine(pinned, into, mining).build.manifest.version
    else:
        version = found.version
    return config.model_copy(update={"dataset": dataset.model_copy(update={"name": into, "version": version})})


def read_night(storage: Storage, name: str, run_id: str) -> Night | None:
    """What came of a night; None while it is not over. Raises CorruptObject."""
    key = layout.night_key(name, run_id)
    try:
        return unseal(Night, storage.read(key), storage.uri_of(key), hint="delete it, and start the night again")
    except ObjectNotFound:
        return None


def list_nights(storage: Storage, name: str) -> list[str]:
    """Run ids of the nights that are over, the newest first."""
    return layout.night_run_ids(storage.list(layout.nights_prefix(name)), name)[::-1]


def _identical_night(storage: Storage, plan: TrainPlan) -> Night | None:
    """An earlier night of this very recipe and data: another would end like it."""
    alike = plan.run_id.partition("-")[2]  # all but the date
    for run_id in list_nights(storage, plan.config.name):
        if run_id.partition("-")[2] == alike:
            night = read_night(storage, plan.config.name, run_id)
            if night is not None and night.dataset_versions == plan.dataset_versions:
                return night
    return None


def _gate_candidate(storage: Storage, plan: TrainPlan, date: datetime.date, began: float, who: str, say: Say) -> Night:
    best = read_best(storage, plan.run_id)
    assert best is not None  # run() has published it
    sets = plan.config.gate.out_of_domain
    far = {found.name: read_manifest(storage, found.name, found.version).version for found in sets}
    candidate = Request(role=CANDIDATE, commit=best, out_of_domain=far)
    base = Request(role=BASE_MODEL, commit=None, out_of_domain=far)
    compared: list[tuple[Champion | None, dict[Role, Measurement]]] = []

    def decide(present: Champion | None) -> GateDecision:
        requests = [base, candidate]
        if present is not None:
            commit = read_version(storage, present.name, present.version).commit
            requests.append(Request(role=_reference(present), commit=commit, out_of_domain=far))
        say("comparison: " + ", ".join(request.role.key for request in requests))
        measured = _measured(storage, plan, requests)
        compared.append((present, measured))
        return compare(storage, plan, measured[_reference(present)], measured[CANDIDATE])

    promotion = promote(storage, plan.config.name, plan.lineage, decide, who)
    outcome, sentence = _outcome(storage, promotion, plan.run_id)
    night = _night(plan, date, began, outcome, sentence)
    if not compared:  # an earlier start of this night died after it had promoted the candidate
        return night.model_copy(update={"champion": promotion.champion and promotion.champion.generation})
    present, measured = compared[-1]
    return night.model_copy(
        update={
            "warning": _warning(storage, plan, measured[_reference(present)]),
            "champion_before": present and present.generation,
            "champion": promotion.champion and promotion.champion.generation,
            "metrics": {role.key: means(storage, plan.run_id, found) for role, found in measured.items()},
            "index_impact": impact(storage, plan, measured[_reference(present)], measured[CANDIDATE]),
        }
    )


def _warning(storage: Storage, plan: TrainPlan, measured: Measurement) -> str | None:
    try:
        return label_warning(storage, plan, _version_before(storage, plan), measured)
    except (ObjectNotFound, CorruptObject) as error:  # the night stands without it
        return f"The new rows were not looked at: {error.message}"


def _version_before(storage: Storage, plan: TrainPlan) -> str | None:
    """Of the dataset, in the night before this one; else what this version was appended to."""
    dataset = plan.datasets[0].name
    for run_id in list_nights(storage, plan.config.name):
        night = read_night(storage, plan.config.name, run_id)
        version = night.dataset_versions.get(dataset) if night else None
        if version not in (None, plan.dataset_version):
            return version
    return read_manifest(storage, dataset, plan.dataset_version).parent


def _reference(champion: Champion | None) -> Role:
    """Role of the model that a candidate is compared with."""
    return BASE_MODEL if champion is None else Role("champion", champion.generation)


def _outcome(storage: Storage, promotion: Promotion, run_id: str) -> tuple[Outcome, str]:
    decision, champion = promotion.decision, promotion.champion
    if decision is not None:
        return OUTCOMES[decision.verdict], decision.sentence
    assert champion is not None  # this run was the champion once
    if read_version(storage, champion.name, champion.version).lineage.run_id == run_id:
        return "promoted", champion.reason
    return "kept", "This run was the champion before, and another one was put in its place."


def _measured(storage: Storage, plan: TrainPlan, requests: list[Request]) -> dict[Role, Measurement]:
    """What was measured before is not measured again."""
    missing = [request for request in requests if read_measured(storage, plan.run_id, request) is None]
    if missing:
        session.start_ray(plan.config.workers)
        tasks = {request.role.key: partial(measure, plan, request) for request in missing}
        session.in_fresh_processes(session.with_devices(plan.config).workers, tasks)
    found = {request.role: read_measured(storage, plan.run_id, request) for request in requests}
    return {role: measured for role, measured in found.items() if measured is not None}


def _pinned(config: Config, plan: TrainPlan) -> Config:
    """The recipe with the versions of the plan, whatever is appended meanwhile."""
    first, *mix = (
        part.model_copy(update={"version": planned.version})
        for part, planned in zip((config.dataset, *config.mix), plan.datasets, strict=True)
    )
    return config.model_copy(update={"dataset": first, "mix": tuple(mix)})


def _night(plan: TrainPlan, date: datetime.date, began: float, outcome: Outcome, sentence: str) -> Night:
    return Night(
        name=plan.config.name,
        date=date,
        run_id=plan.run_id,
        experiment_hash=plan.config.experiment_hash(),
        dataset_versions=plan.dataset_versions,
        outcome=outcome,
        sentence=sentence,
        unix_seconds=time.time(),
        seconds=time.monotonic() - began,
    )
