"""Pure: recipe and findings of the survey → `TrainPlan`. Combinations that cannot work are refused here, before a GPU
is asked for."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import model_validator

from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.registry import Lineage
from tercet.config.recipe import Config, on_world, rows_per_rank_and_micro_batch, world_sizes
from tercet.config.sections import Parallelism
from tercet.errors import PlanError
from tercet.planning import packing
from tercet.planning.dataset_plan import FoundDataset, PlannedDataset, plan_dataset
from tercet.planning.estimates import (
    GPU_OVERHEAD_BYTES,
    SHARE_OF_MEMORY,
    Kept,
    Memory,
    available_bytes,
    checkpoint_bytes,
    fits,
    kept_for_backward,
    memory_of,
    size_text,
    tokens_per_text,
    training_seconds,
    with_likely_precision,
)
from tercet.planning.model_files import ModelFacts
from tercet.planning.parallelism import choose
from tercet.planning.problems import (
    accumulation_problems,
    data_problems,
    dataset_problems,
    loss_problems,
    worker_problems,
)
from tercet.storage.documents import Document, Frozen

ENGINE = 1
"""Number of the rules by which this code turns a plan into numbers.

Raise it whenever the code would compute anything else for the same plan: other batches, another order, other rounding.
Keep the old rules behind the old number, or remove that number from SUPPORTED_ENGINES. A run keeps the engine that it
was started with. The engine is no part of the experiment: it changes neither the experiment hash nor the run id."""

SUPPORTED_ENGINES = (1,)
"""Engines whose rules this code can follow."""


def check_engine(engine: int, run_id: str) -> None:
    """Raise PlanError if this code cannot follow the rules by which the run was started."""
    if engine in SUPPORTED_ENGINES:
        return
    supported = ", ".join(map(str, SUPPORTED_ENGINES))
    if engine > ENGINE:
        raise PlanError(
            f"run {run_id} was planned by a newer tercet: its engine is {engine}, and this tercet supports {supported}",
            hint="update tercet on this machine, or start another run with a new --run-id",
        )
    raise PlanError(
        f"this tercet no longer supports engine {engine}, with which run {run_id} was started; it supports {supported}",
        hint="use the version of tercet that started the run, or start another run with a new --run-id",
    )


class PlannedChampion(Frozen):
    """The champion at the time when a run was planned."""

    generation: int
    version: int
    commit: Commit
    dataset_versions: dict[str, str]
    """Dataset versions that it was trained on, by name: all other rows are new."""


class TrainPlan(Document):
    """Everything derived from a recipe: the workers' only input. Counts are of rows, steps or texts as named."""

    run_id: str
    engine: int = 1
    """See ENGINE. A plan without it, as tercet wrote them at first, is of engine 1."""
    config: Config
    dataset_version: str
    """Version of the dataset that the model is measured on. `columns` and `num_rows` describe this version too."""
    columns: tuple[str, ...]
    num_rows: dict[str, int]
    datasets: tuple[PlannedDataset, ...]
    """Datasets to train on: the one that the model is measured on, then the mix."""
    num_train_rows: int
    """Rows of all datasets together. `num_dropped_rows` and the steps count all datasets too."""
    num_dropped_rows: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    rows_per_rank_and_micro_batch: int
    evaluation_steps: tuple[int, ...]
    """Optimizer steps after which the eval split is measured and a checkpoint written; 0 is the baseline."""
    checkpoint_bytes: int | None
    parallelism: Parallelism
    """The mode that was chosen; never `auto`."""
    parallelism_reason: str
    forward: str | None = None
    """How texts share a forward pass, and why; None when the model's files are not on this machine."""
    memory: Memory | None
    """Estimated memory of one worker; None when the model's files are not on this machine."""
    memory_bytes_available: int | None
    """Memory that one worker has; None when unknown."""
    training_seconds: float | None
    champion: PlannedChampion | None = None
    """Present if the recipe needs it: for the weights to start from, or to know which rows are new."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_newer_engine(cls, values: Any) -> Any:
        """A plan of a newer engine may have unknown fields. The user needs to hear of the engine, not of those."""
        engine = values.get("engine") if isinstance(values, dict) else None
        if isinstance(engine, int) and engine > ENGINE:
            check_engine(engine, str(values.get("run_id")))
        return values

    @property
    def starts_from(self) -> Commit | None:
        """Commit of the model that training starts from; None: the recipe's base model."""
        return self.champion.commit if self.champion and self.config.model.start_from == "champion" else None

    @property
    def rows_per_loss_call(self) -> int:
        """Rows in one loss call: the global micro-batch if the loss gathers embeddings, else one rank's rows."""
        num_ranks = self.config.workers.num_workers if self.config.loss.crosses_ranks else 1
        return num_ranks * self.rows_per_rank_and_micro_batch

    @property
    def metric(self) -> str:
        """Metric that selects the best checkpoint."""
        return self.config.evaluation.metric

    @property
    def dataset_versions(self) -> dict[str, str]:
        """Versions of all datasets to train on, by name."""
        return {dataset.name: dataset.version for dataset in self.datasets}

    @property
    def lineage(self) -> Lineage:
        """Origin of the model that this run makes."""
        return Lineage(
            run_id=self.run_id, recipe_hash=self.config.experiment_hash(), dataset_versions=self.dataset_versions
        )

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of workers that the run may continue with, ascending."""
        return world_sizes(self.config)

    def on(self, world_size: int) -> TrainPlan:
        """Return the plan for one of its `world_sizes`. The global batches, and so the steps, stay the same.

        Raises PlanError for any other number of workers."""
        if world_size not in self.world_sizes:
            allowed = ", ".join(map(str, self.world_sizes))
            raise PlanError(
                f"the plan is for {allowed} workers, but {world_size} were started",
                hint="start as many processes as the plan says, or plan again with --set workers.num_workers",
            )
        config = on_world(self.config, world_size)
        return self.model_copy(
            update={"config": config, "rows_per_rank_and_micro_batch": rows_per_rank_and_micro_batch(config)}
        )

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of the checkpoints that are kept (the newest, the best), the one being written and the published model.
        None when the size of a checkpoint is unknown."""
        if self.checkpoint_bytes is None:
            return None
        steps = set(self.evaluation_steps[1:])
        if (every_steps := self.config.checkpoint.every_steps) is not None:
            steps.update(range(every_steps, self.num_steps + 1, every_steps))
        num_kept = min(len(steps), self.config.checkpoint.keep_last + 2)
        return num_kept * self.checkpoint_bytes + self.checkpoint_bytes // 3

    @property
    def shares(self) -> tuple[str, ...]:
        """Contribution of each dataset to an epoch, in words; empty for a single dataset with weight 1."""
        alone = len(self.datasets) == 1 and self.datasets[0].weight == 1
        return () if alone else tuple(dataset.text() for dataset in self.datasets)

    @property
    def memory_warning(self) -> str | None:
        """Warning that the mode named by the recipe probably does not fit. It is used all the same."""
        workers, available = self.config.workers, self.memory_bytes_available
        if self.memory is None or available is None or fits(self.memory, workers, available):
            return None
        return (
            f"{self.parallelism} needs {size_text(self.memory.needed_bytes(workers))}, more than {SHARE_OF_MEMORY:.0%} "
            f"of the {size_text(available)} a worker has: it may run out of memory; try workers.parallelism=auto"
        )


def make_run_id(config: Config, dataset_versions: Sequence[str], today: datetime.date) -> str:
    """Return the id of a new run. The same recipe on the same data on the same UTC day is the same run, so that
    submitting it again resumes it. `survey` resumes an unfinished run on later days too."""
    data = dataset_versions[0]
    if len(dataset_versions) > 1:
        data = hashlib.sha256("\n".join(dataset_versions).encode()).hexdigest()
    return f"{today:%Y%m%d}-{config.name}-{config.experiment_hash()}-{data[:8]}"


@dataclass(frozen=True)
class Findings:
    """What the survey of storage and of this machine found for a recipe."""

    run_id: str
    datasets: tuple[FoundDataset, ...]
    """The dataset that the model is measured on, then the mix, in the recipe's order."""
    model: ModelFacts | None = None
    """None when the model's files are not on this machine."""
    packing: packing.Facts | None = None
    cpu_worker_bytes: int | None = None
    """A CPU worker's share of this machine's memory; None when unknown."""
    gpu_bytes: int | None = None
    """Memory of a GPU of the workers; None when unknown, or if they use none."""
    has_fused_attention: bool = False
    """Whether packed texts on a GPU may use an attention kernel that keeps no weights."""
    champion: PlannedChampion | None = None
    engine: int = ENGINE
    """Engine of the run: that of its stored plan if it was started before."""


@dataclass(frozen=True)
class Counts:
    """Rows and steps of a run."""

    datasets: tuple[PlannedDataset, ...]
    num_train_rows: int
    num_dropped_rows: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    evaluation_steps: tuple[int, ...]


@dataclass(frozen=True)
class Mode:
    """The parallelism of a run, after all checks passed."""

    parallelism: Parallelism
    reason: str


@dataclass(frozen=True)
class Costs:
    """Estimated size and time; None when the model's files are not on this machine."""

    checkpoint_bytes: int | None
    memory: Memory | None
    training_seconds: float | None


def make_plan(config: Config, findings: Findings) -> TrainPlan:
    """Derive the plan of a run.

    Raises PlanError with every combination that cannot work."""
    sizes = world_sizes(config)
    tightest = config
    if sizes:
        config = on_world(config, max([size for size in sizes if size <= config.workers.num_workers], default=sizes[0]))
        tightest = on_world(config, sizes[0])  # with the fewest workers, each holds the most
    tightest = with_likely_precision(tightest)
    most_kept = _most_kept(tightest, findings)
    memory_bytes = available_bytes(tightest.workers, findings.cpu_worker_bytes, findings.gpu_bytes)
    counts = count(config, findings.datasets)
    mode = check(tightest, findings, counts, most_kept, memory_bytes)
    costs = estimate(config, tightest, findings, counts, mode, most_kept)
    measured = findings.datasets[0].manifest
    return TrainPlan(
        run_id=findings.run_id,
        engine=findings.engine,
        config=config,
        dataset_version=measured.version,
        columns=measured.text_columns,
        num_rows={split: measured.num_rows[split] for split in ("train", "eval", "test")},
        datasets=counts.datasets,
        num_train_rows=counts.num_train_rows,
        num_dropped_rows=counts.num_dropped_rows,
        steps_per_epoch=counts.steps_per_epoch,
        num_steps=counts.num_steps,
        warmup_steps=counts.warmup_steps,
        rows_per_rank_and_micro_batch=rows_per_rank_and_micro_batch(config),
        evaluation_steps=counts.evaluation_steps,
        checkpoint_bytes=costs.checkpoint_bytes,
        parallelism=mode.parallelism,
        parallelism_reason=mode.reason,
        forward=_forward(config, findings.packing),
        memory=costs.memory,
        memory_bytes_available=memory_bytes,
        training_seconds=costs.training_seconds,
        champion=findings.champion,
    )


def count(config: Config, datasets: Sequence[FoundDataset]) -> Counts:
    """Count rows and steps."""
    planned = tuple(plan_dataset(config, dataset) for dataset in datasets)
    steps_per_epoch = sum(dataset.steps_per_epoch for dataset in planned)
    num_steps = steps_per_epoch * config.training.num_epochs
    # Without a step in an epoch there is nothing to evaluate; `check` refuses such a plan.
    evaluation_steps = tuple(range(0, num_steps + 1, steps_per_epoch)) if steps_per_epoch else ()
    return Counts(
        datasets=planned,
        num_train_rows=sum(dataset.num_train_rows for dataset in planned),
        num_dropped_rows=sum(dataset.num_dropped_rows for dataset in planned),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=math.ceil(config.training.warmup_ratio * num_steps),
        evaluation_steps=evaluation_steps,
    )


def check(config: Config, findings: Findings, counts: Counts, kept: Kept, memory_bytes: int | None) -> Mode:
    """Choose the parallelism and check everything else. `config` has the fewest workers that the recipe allows.

    kept: what a worker keeps for a backward pass. memory_bytes: what a worker has, None when unknown.
    Raises PlanError with all problems, one a line."""
    problems = data_problems(config, findings.datasets[0].manifest) + worker_problems(config)
    problems += accumulation_problems(config)
    problems += [problem for dataset in counts.datasets for problem in dataset_problems(config, dataset)]
    mode = None
    try:
        mode = Mode(*choose(config, findings.model, kept, memory_bytes))
    except PlanError as error:
        problems.append((error.message, error.hint))
    else:
        problems += loss_problems(config, mode.parallelism)
    if mode is None or problems:
        raise PlanError("\n".join(problem for problem, _ in problems), hint="; ".join(hint for _, hint in problems))
    return mode


def _most_kept(config: Config, findings: Findings) -> Kept:
    """Return what a worker keeps for a backward pass, with the dataset of the longest texts."""
    facts = findings.packing
    way = "plain" if facts is None else packing.expected(config.workers.packing, facts)
    on_gpu = config.workers.use_gpu is True or (config.workers.use_gpu == "auto" and findings.gpu_bytes is not None)
    kept = max(kept_for_backward(config, dataset.manifest, findings.model, way) for dataset in findings.datasets)
    if on_gpu and findings.has_fused_attention:
        kept = kept._replace(attention_bytes=0.0)
    return kept._replace(overhead_bytes=GPU_OVERHEAD_BYTES if on_gpu else 0)


def estimate(config: Config, tightest: Config, findings: Findings, counts: Counts, mode: Mode, kept: Kept) -> Costs:
    """Estimate size and time. Memory is that of a worker of `tightest`."""
    facts, training, lora = findings.model, config.training, config.model.lora
    if facts is None:
        return Costs(checkpoint_bytes=None, memory=None, training_seconds=None)
    num_workers, is_cached = tightest.workers.num_workers, config.loss.is_cached
    rows_and_tokens = [
        (planned.steps_per_epoch * training.global_batch_size, sum(tokens_per_text(config, dataset.manifest, facts)))
        for planned, dataset in zip(counts.datasets, findings.datasets, strict=True)
    ]
    tokens_per_epoch = sum(num_rows * tokens_per_row for num_rows, tokens_per_row in rows_and_tokens)
    return Costs(
        checkpoint_bytes=checkpoint_bytes(facts, lora),
        memory=memory_of(facts, mode.parallelism, num_workers, kept, tightest.training, lora, is_cached),
        training_seconds=training_seconds(config, facts, tokens_per_epoch * training.num_epochs),
    )


def _forward(config: Config, facts: packing.Facts | None) -> str | None:
    """How texts share a forward pass, and why, in words."""
    return None if facts is None else packing.describe(config.workers.packing, facts)
