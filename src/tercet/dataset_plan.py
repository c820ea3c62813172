"""Pure: what a dataset version gives to the training."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tercet.config import Config
from tercet.manifest import Manifest
from tercet.replay import Cohort, cohorts
from tercet.sampling import num_steps_per_epoch
from tercet.sections import DatasetConfig


class PlannedDataset(BaseModel):
    """A dataset version that is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    weight: float
    columns: tuple[str, ...]
    num_train_rows: int
    """Rows of its train split that take part (see training.max_train_rows, and dataset.replay)."""
    num_dropped_rows: int
    """Rows that a pass over it leaves out because they do not fill a global batch; other ones in each pass."""
    steps_per_epoch: int
    cohorts: tuple[Cohort, ...] = ()
    """Of the train split, where old rows are replayed; nothing where all take part."""

    def text(self) -> str:
        """In words."""
        rows = f"{self.name} {self.version}: {self.num_train_rows:,} train rows, weight {self.weight:g}"
        new = sum(cohort.num_rows for cohort in self.cohorts if cohort.is_new)
        of = f" ({new:,} new, of {sum(c.num_rows for c in self.cohorts):,} in all)" if self.cohorts else ""
        return f"{rows}{of}, {self.steps_per_epoch:,} steps an epoch"


def plan_dataset(
    config: Config, part: DatasetConfig, manifest: Manifest, seen: Manifest | None = None
) -> PlannedDataset:
    """What a dataset version gives, as the recipe asks. `seen`: the version of it that the champion was trained on."""
    batch_size, num_rows = config.training.global_batch_size, manifest.num_rows["train"]
    parts = cohorts(manifest, seen, part.replay)
    if parts:
        num_rows = sum(cohort.num_kept_rows for cohort in parts)
    num_rows = min(num_rows, config.training.max_train_rows or num_rows)
    return PlannedDataset(
        name=manifest.dataset,
        version=manifest.version,
        weight=part.weight,
        columns=manifest.text_columns,
        num_train_rows=num_rows,
        num_dropped_rows=num_rows % batch_size,
        steps_per_epoch=num_steps_per_epoch(num_rows, batch_size, part.weight),
        cohorts=parts,
    )


def dataset_problems(config: Config, dataset: PlannedDataset) -> list[tuple[str, str]]:
    """What keeps it from being trained on: each problem with a hint."""
    found = []
    batch_size = config.training.global_batch_size
    num_batches = num_steps_per_epoch(dataset.num_train_rows, batch_size)
    if num_batches == 0:
        found.append(
            (
                f"{dataset.num_train_rows} train rows of {dataset.name} do not fill one global batch of {batch_size}",
                "lower training.global_batch_size or add rows",
            )
        )
    elif dataset.steps_per_epoch == 0:
        found.append(
            (
                f"the weight {dataset.weight:g} of {dataset.name}, which has {num_batches} global batches, "
                "gives no batch to an epoch",
                f"raise it to {1 / num_batches:.2g} or more",
            )
        )
    column_problem = config.loss.column_problem(dataset.columns)
    if column_problem is not None:
        need, hint = column_problem
        has = f"{dataset.name} {dataset.version} has {', '.join(dataset.columns)}"
        found.append((f"loss.name={config.loss.name} {need}; {has}", hint))
    return found
