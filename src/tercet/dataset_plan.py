"""Pure: what a dataset version gives to the training."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tercet.config import Config
from tercet.manifest import Manifest
from tercet.sampling import num_steps_per_epoch


class PlannedDataset(BaseModel):
    """A dataset version that is trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    weight: float
    columns: tuple[str, ...]
    num_train_rows: int
    """Rows of its train split that take part (see training.max_train_rows)."""
    num_dropped_rows: int
    """Rows that a pass over it leaves out because they do not fill a global batch; other ones in each pass."""
    steps_per_epoch: int

    def text(self) -> str:
        """In words."""
        rows = f"{self.name} {self.version}: {self.num_train_rows:,} train rows, weight {self.weight:g}"
        return f"{rows}, {self.steps_per_epoch:,} steps an epoch"


def plan_dataset(config: Config, weight: float, manifest: Manifest) -> PlannedDataset:
    """What a dataset version gives, as the recipe asks."""
    batch_size, num_rows = config.training.global_batch_size, manifest.num_rows["train"]
    num_rows = min(num_rows, config.training.max_train_rows or num_rows)
    return PlannedDataset(
        name=manifest.dataset,
        version=manifest.version,
        weight=weight,
        columns=manifest.text_columns,
        num_train_rows=num_rows,
        num_dropped_rows=num_rows % batch_size,
        steps_per_epoch=num_steps_per_epoch(num_rows, batch_size, weight),
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
