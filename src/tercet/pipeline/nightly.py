"""One night: new rows in, a run, a comparison with the champion, and the champion kept or replaced.

A night is named by its run, which is named by date, recipe and data. So two starts of one night are one run; a night
that was interrupted resumes when it is started again; a night that is over returns its outcome.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field

from tercet.artifacts.best import read_best
from tercet.artifacts.champion import Champion
from tercet.artifacts.checkpoint import Commit
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
from tercet.evaluation.evaluate import measuring_precision
from tercet.evaluation.label_check import label_warning
from tercet.evaluation.measurement import MeasuredModel, Request, measure, read_measured
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
    """The outcome of a night."""

    name: str
    date: datetime.date
    run_id: str
    experiment_hash: str
    dataset_versions: dict[str, str]
    outcome: Outcome
    sentence: str
    champion_before: int | None = None
    """Generation of the champion that the candidate was compared with; None for the base model."""
    champion: int | None = None
    """Generation of the champion afterwards."""
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metrics on the test split, of the base model, the champion before and the candidate."""
    index_impact: IndexImpact | None = None
    warning: str | None = None
    """Warning about the labels of new rows. It does not change the decision."""
    unix_seconds: float
    """When the night ended."""
    seconds: float
    """Wall clock of the last start."""


def night_of(now: datetime.datetime, begins_at_utc_hour: int) -> datetime.date:
    """Return the night that a moment belongs to, named by the UTC date on which it began."""
    return (now.astimezone(datetime.UTC) - datetime.timedelta(hours=begins_at_utc_hour)).date()


def nightly(config: Config, user: str, say: Say, now: datetime.datetime | None = None) -> Night:
    """Do tonight's night, resume it, or return its outcome if it is over. `say` gets a line before each stage.

    A rejected candidate is an outcome. What ends the run or the comparison is raised: the champion stays as it was, and
    the next start resumes the night."""
    began = time.monotonic()
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    date = night_of(now or datetime.datetime.now(datetime.UTC), config.nightly.begins_at_utc_hour)
    say(f"data: {add_rows(config, storage)}")
    config = _with_mined_negatives(config, storage, say)
    _, plan = survey(config, today=date)
    night = read_night(storage, config.name, plan.run_id)
    if night is None:
        earlier = _identical_night(storage, plan)
        if earlier is None:
            night = _train_and_gate(storage, config, plan, date, began, user, say)
        else:
            sentence = f"nothing is new since the night of {earlier.date}: the same recipe, the same data"
            night = _night(plan, date, began, "nothing_to_do", sentence)
    notify(storage, config, say)
    return night


def add_rows(config: Config, storage: Storage) -> str:
    """Add the rows of new files to the dataset. Returns a description of what was added."""
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
    """Return the recipe on the mined dataset, if it asks for one.

    A version is mined only once: another model would find other negatives, and a night that is started again would be
    another run."""
    mining, dataset = config.nightly.mine, config.dataset
    if mining is None:
        return config
    into, source = f"{dataset.name}-mined", read_manifest(storage, dataset.name, dataset.version).version
    mined = read_mined(storage, into, source, mining)
    if mined is None:
        say(f"negatives: mining {dataset.name} {source}")
        pinned = config.model_copy(update={"dataset": dataset.model_copy(update={"version": source})})
        version = mine(pinned, into, mining).build.manifest.version
    else:
        version = mined.version
    return config.model_copy(update={"dataset": dataset.model_copy(update={"name": into, "version": version})})


def read_night(storage: Storage, name: str, run_id: str) -> Night | None:
    """Return the outcome of a night, or None if it is not over. Raises CorruptObject."""
    key = layout.night_key(name, run_id)
    try:
        return unseal(Night, storage.read(key), storage.uri_of(key), hint="delete it, and start the night again")
    except ObjectNotFound:
        return None


def list_nights(storage: Storage, name: str) -> list[str]:
    """Return the run ids of the nights that are over, newest first."""
    return layout.night_run_ids(storage.list(layout.nights_prefix(name)), name)[::-1]


def _identical_night(storage: Storage, plan: TrainPlan) -> Night | None:
    """Return an earlier night with the same recipe and data, which would have the same outcome."""
    all_but_date = plan.run_id.partition("-")[2]
    for run_id in list_nights(storage, plan.config.name):
        if run_id.partition("-")[2] == all_but_date:
            night = read_night(storage, plan.config.name, run_id)
            if night is not None and night.dataset_versions == plan.dataset_versions:
                return night
    return None


def _train_and_gate(
    storage: Storage, config: Config, plan: TrainPlan, date: datetime.date, began: float, user: str, say: Say
) -> Night:
    say(f"run: {plan.run_id}")
    run(_pinned(config, plan), plan.run_id)
    gate = _Gate(storage, plan, say)
    promotion = promote(storage, plan.config.name, plan.lineage, gate.decide, user)
    outcome, sentence = _outcome(storage, promotion, plan.run_id)
    champion = promotion.champion and promotion.champion.generation
    night = _night(plan, date, began, outcome, sentence, champion=champion, **gate.findings())
    with contextlib.suppress(AlreadyExists):  # written by another start of this night
        storage.put_if_absent(layout.night_key(plan.config.name, plan.run_id), seal(night))
    return night


class _Gate:
    """Compares a run's candidate with the present champion, again if the champion changes meanwhile."""

    def __init__(self, storage: Storage, plan: TrainPlan, say: Say) -> None:
        self._storage, self._plan, self._say = storage, plan, say
        self._champion: Champion | None = None
        self._models: dict[Role, MeasuredModel] = {}  # of the last comparison

    def decide(self, present: Champion | None) -> GateDecision:
        """Measure the models that are not measured yet, and gate the candidate against the reference."""
        requests = self._requests(present)
        self._say("comparison: " + ", ".join(request.role.key for request in requests))
        self._champion, self._models = present, _measured(self._storage, self._plan, requests)
        return compare(self._plan, self._models[_reference(present)], self._models[CANDIDATE])

    def findings(self) -> dict[str, Any]:
        """Return the fields of `Night` that come from the last comparison.

        There are none if an earlier start of the night promoted the candidate and then died."""
        if not self._models:
            return {}
        reference, candidate = self._models[_reference(self._champion)], self._models[CANDIDATE]
        return {
            "champion_before": self._champion and self._champion.generation,
            "metrics": {role.key: means(model) for role, model in self._models.items()},
            "index_impact": impact(self._plan, reference, candidate),
            "warning": _warning(self._storage, self._plan, reference),
        }

    def _requests(self, present: Champion | None) -> list[Request]:
        best = read_best(self._storage, self._plan.run_id)
        assert best is not None  # run() has published it
        out_of_domain = {
            dataset.name: read_manifest(self._storage, dataset.name, dataset.version).version
            for dataset in self._plan.config.gate.out_of_domain
        }
        commits: dict[Role, Commit | None] = {BASE_MODEL: None, CANDIDATE: best}
        if present is not None:
            commits[_reference(present)] = read_version(self._storage, present.name, present.version).commit
        return [Request(role=role, commit=commit, out_of_domain=out_of_domain) for role, commit in commits.items()]


def _reference(champion: Champion | None) -> Role:
    """Return the role of the model that a candidate is compared with."""
    return BASE_MODEL if champion is None else Role("champion", champion.generation)


def _measured(storage: Storage, plan: TrainPlan, requests: list[Request]) -> dict[Role, MeasuredModel]:
    """Return the measured model of each request. Only those are measured that have no stored results, or results in
    another precision than the others."""
    stored = [read_measured(storage, plan.run_id, request) for request in requests]
    if None in stored or len({model.measurement.precision for model in stored if model is not None}) > 1:
        session.start_ray(plan.config.workers)
        plan = plan.model_copy(update={"config": session.with_devices(plan.config)})
        precision = measuring_precision(plan, storage)
        tasks = {
            request.role.key: partial(measure, plan, request)
            for request, model in zip(requests, stored, strict=True)
            if model is None or model.measurement.precision != precision
        }
        session.in_fresh_processes(plan.config.workers, tasks)
    models = {request.role: read_measured(storage, plan.run_id, request) for request in requests}
    return {role: model for role, model in models.items() if model is not None}


def _warning(storage: Storage, plan: TrainPlan, reference: MeasuredModel) -> str | None:
    try:
        return label_warning(plan, _earlier_version(storage, plan), reference)
    except (ObjectNotFound, CorruptObject) as error:  # the decision does not depend on it
        return f"The labels of the new rows were not checked: {error.message}"


def _earlier_version(storage: Storage, plan: TrainPlan) -> str | None:
    """Return the dataset's version in the night before this one, or else the version that this one was appended to."""
    dataset = plan.datasets[0].name
    for run_id in list_nights(storage, plan.config.name):
        night = read_night(storage, plan.config.name, run_id)
        version = night.dataset_versions.get(dataset) if night else None
        if version not in (None, plan.dataset_version):
            return version
    return read_manifest(storage, dataset, plan.dataset_version).parent


def _outcome(storage: Storage, promotion: Promotion, run_id: str) -> tuple[Outcome, str]:
    decision, champion = promotion.decision, promotion.champion
    if decision is not None:
        return OUTCOMES[decision.verdict], decision.sentence
    assert champion is not None  # this run was the champion at some time
    if read_version(storage, champion.name, champion.version).lineage.run_id == run_id:
        return "promoted", champion.reason
    return "kept", "This run was the champion before, and another one has replaced it."


def _pinned(config: Config, plan: TrainPlan) -> Config:
    """Return the recipe with the plan's dataset versions, so that rows appended meanwhile are not used."""
    first, *mix = (
        part.model_copy(update={"version": planned.version})
        for part, planned in zip((config.dataset, *config.mix), plan.datasets, strict=True)
    )
    return config.model_copy(update={"dataset": first, "mix": tuple(mix)})


def _night(plan: TrainPlan, date: datetime.date, began: float, outcome: Outcome, sentence: str, **fields: Any) -> Night:
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
        **fields,
    )
