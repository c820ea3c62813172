"""Pure: recipe and what storage holds → `TrainPlan`. Wrong combinations die here, before a GPU is asked for."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.registry import Lineage
from tercet.config.recipe import Config, on_world, rows_per_rank_and_micro_batch, world_sizes
from tercet.config.sections import Parallelism
from tercet.data.manifest import Manifest
from tercet.errors import PlanError
from tercet.planning import packing
from tercet.planning.dataset_plan import PlannedDataset, plan_dataset
from tercet.planning.estimates import (
    ADAM_BYTES,
    SHARE_OF_MEMORY,
    WEIGHT_BYTES,
    Memory,
    available_bytes,
    fits,
    memory_of,
    num_trainable_parameters,
    size_text,
    tokens_kept,
    tokens_per_text,
    training_seconds,
)
from tercet.planning.model_files import ModelFacts
from tercet.planning.parallelism import choose
from tercet.planning.problems import data_problems, dataset_problems, loss_problems, worker_problems


class PlannedChampion(BaseModel):
    """The champion when a run was planned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: int
    version: int
    commit: Commit
    dataset_versions: dict[str, str]
    """What it was trained on: other rows are new."""


class TrainPlan(BaseModel):
    """Everything derived, and frozen: what the workers get. Counts are of rows, steps or texts as named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    config: Config
    dataset_version: str
    """Of the dataset that the model is measured on, as are the columns and the rows of each split."""
    columns: tuple[str, ...]
    num_rows: dict[str, int]
    datasets: tuple[PlannedDataset, ...]
    """What is trained on: that dataset, then the mix."""
    num_train_rows: int
    """Of all datasets together, as are the dropped rows and the steps."""
    num_dropped_rows: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    rows_per_rank_and_micro_batch: int
    evaluation_steps: tuple[int, ...]
    """Optimizer steps after which the eval split is measured and a checkpoint written; 0 is the baseline."""
    checkpoint_bytes: int | None
    parallelism: Parallelism
    """Settled: never `auto`."""
    parallelism_reason: str
    forward: str | None = None
    """How texts share a forward pass, and why; None when the model's files are not on this machine."""
    memory: Memory | None
    """Of one worker; None when the model's files are not on this machine."""
    memory_bytes_available: int | None
    """To one worker; None when unknown."""
    training_seconds: float | None
    champion: PlannedChampion | None = None
    """Where the recipe asks for it: its weights to start from, or its data to tell which rows are new."""

    @property
    def starts_from(self) -> Commit | None:
        """The model that training starts from, where that is not the recipe's base model."""
        return self.champion.commit if self.champion and self.config.model.start_from == "champion" else None

    @property
    def rows_per_loss_call(self) -> int:
        """In one call of the loss: of all ranks where it gathers their embeddings, else of one."""
        num_ranks = self.config.workers.num_workers if self.config.loss.crosses_ranks else 1
        return num_ranks * self.rows_per_rank_and_micro_batch

    @property
    def metric(self) -> str:
        """What best means."""
        return self.config.evaluation.metric

    @property
    def dataset_versions(self) -> dict[str, str]:
        """Of everything that is trained on, by name."""
        return {dataset.name: dataset.version for dataset in self.datasets}

    @property
    def lineage(self) -> Lineage:
        """Where the model of this run comes from."""
        return Lineage(
            run_id=self.run_id, recipe_hash=self.config.experiment_hash(), dataset_versions=self.dataset_versions
        )

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of workers that the run may go on with, ascending."""
        return world_sizes(self.config)

    def on(self, world_size: int) -> TrainPlan:
        """The plan on one of its `world_sizes`, else PlanError. The global batches, and so the steps, stay the same."""
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
        """Of the checkpoints that stay (the newest, the best), of the one being written, and of the published model."""
        if self.checkpoint_bytes is None:
            return None
        steps = set(self.evaluation_steps[1:])
        if (every_steps := self.config.checkpoint.every_steps) is not None:
            steps.update(range(every_steps, self.num_steps + 1, every_steps))
        num_kept = min(len(steps), self.config.checkpoint.keep_last + 2)
        return num_kept * self.checkpoint_bytes + self.checkpoint_bytes // 3

    @property
    def shares(self) -> tuple[str, ...]:
        """What each dataset gives to an epoch, in words; nothing where a single one gives its rows once."""
        alone = len(self.datasets) == 1 and self.datasets[0].weight == 1
        return () if alone else tuple(dataset.text() for dataset in self.datasets)

    @property
    def memory_warning(self) -> str | None:
        """For a mode that the recipe names and that probably does not fit: it is not overruled."""
        workers, available = self.config.workers, self.memory_bytes_available
        if self.memory is None or available is None or fits(self.memory, workers, available):
            return None
        return (
            f"{self.parallelism} needs {size_text(self.memory.needed_bytes(workers))}, more than {SHARE_OF_MEMORY:.0%} "
            f"of the {size_text(available)} a worker has: it may run out of memory; try workers.parallelism=auto"
        )


def make_run_id(config: Config, dataset_versions: Sequence[str], today: datetime.date) -> str:
    """The same recipe on the same data on the same UTC day is the same run: submitting it again resumes. One that has
    not ended is resumed on later days too (survey.py)."""
    data = dataset_versions[0]
    if len(dataset_versions) > 1:
        data = hashlib.sha256("\n".join(dataset_versions).encode()).hexdigest()
    return f"{today:%Y%m%d}-{config.name}-{config.experiment_hash()}-{data[:8]}"


def make_plan(
    config: Config,
    manifest: Manifest,
    facts: ModelFacts | None,
    today: datetime.date,
    run_id: str | None = None,
    memory_bytes_available: int | None = None,
    mix: Sequence[Manifest] = (),
    champion: PlannedChampion | None = None,
    seen: Sequence[Manifest | None] | None = None,
    packing_facts: packing.Facts | None = None,
) -> TrainPlan:
    """Derive everything. `memory_bytes_available`: a CPU worker's share of its machine, where the recipe does not say.
    `mix`: the manifest of each dataset in the recipe's `mix`. `seen`: of each dataset, the version that the champion
    was trained on, where there is one.

    Raises PlanError naming every combination that cannot work."""
    sizes = world_sizes(config)
    if sizes:
        config = on_world(config, max([size for size in sizes if size <= config.workers.num_workers], default=sizes[0]))
    # With the fewest workers each has the most to hold.
    tightest = on_world(config, sizes[0]) if sizes else config
    training, workers = config.training, tightest.workers
    num_rows = {split: manifest.num_rows[split] for split in ("train", "eval", "test")}
    manifests = (manifest, *mix)
    datasets = tuple(
        plan_dataset(config, part, found, before)
        for part, found, before in zip(
            (config.dataset, *config.mix), manifests, seen or [None] * len(manifests), strict=True
        )
    )
    steps_per_epoch = sum(dataset.steps_per_epoch for dataset in datasets)
    tokens_per_epoch = sum(
        dataset.steps_per_epoch * training.global_batch_size * sum(tokens_per_text(config, found, facts))
        for dataset, found in zip(datasets, manifests, strict=True)
    )
    num_tokens = max(tokens_kept(tightest, found, facts) for found in manifests)
    memory_bytes_available = available_bytes(workers, memory_bytes_available)

    problems = data_problems(config, manifest) + worker_problems(tightest)
    problems += [problem for dataset in datasets for problem in dataset_problems(config, dataset)]
    try:
        parallelism, reason = choose(tightest, facts, num_tokens, memory_bytes_available)
    except PlanError as error:
        problems.append((error.message, error.hint))
    else:
        problems += loss_problems(tightest, parallelism)
    if problems:
        raise PlanError("\n".join(problem for problem, _ in problems), hint="; ".join(hint for _, hint in problems))

    num_steps = steps_per_epoch * training.num_epochs
    lora = config.model.lora
    forward = None if packing_facts is None else "{}  ({})".format(*packing.choose(workers.packing, packing_facts))
    return TrainPlan(
        run_id=run_id or make_run_id(config, [dataset.version for dataset in datasets], today),
        config=config,
        dataset_version=manifest.version,
        columns=manifest.text_columns,
        num_rows=num_rows,
        datasets=datasets,
        num_train_rows=sum(dataset.num_train_rows for dataset in datasets),
        num_dropped_rows=sum(dataset.num_dropped_rows for dataset in datasets),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=math.ceil(training.warmup_ratio * num_steps),
        rows_per_rank_and_micro_batch=rows_per_rank_and_micro_batch(config),
        evaluation_steps=tuple(range(0, num_steps + 1, steps_per_epoch)),
        # All weights, and Adam's two moments of those that are trained.
        checkpoint_bytes=None
        if facts is None
        else WEIGHT_BYTES * facts.num_parameters + ADAM_BYTES * num_trainable_parameters(facts, lora),
        parallelism=parallelism,
        parallelism_reason=reason,
        forward=forward,
        memory=None
        if facts is None
        else memory_of(facts, parallelism, workers.num_workers, num_tokens, training, lora, config.loss.is_cached),
        memory_bytes_available=memory_bytes_available,
        training_seconds=training_seconds(config, facts, tokens_per_epoch * training.num_epochs),
        champion=champion,
    )
