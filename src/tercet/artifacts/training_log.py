"""What workers record beside checkpoints: the metrics of each evaluation, and the log of a finished training."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from tercet.artifacts.throughput import Throughput
from tercet.storage.documents import Document


class Evaluation(Document):
    """Metrics on the eval split after a step. In storage the metrics are fields beside `step` and `epoch`."""

    model_config = ConfigDict(extra="allow")
    once_unsealed: ClassVar[bool] = True
    __pydantic_extra__: dict[str, float] = Field(init=False)

    step: int
    epoch: float

    def entry(self) -> dict[str, float]:
        """Return step, epoch and metrics in one dictionary."""
        return self.model_dump(exclude={"format"})


class TrainingLog(Document):
    """The log of a finished training, of its last attempt."""

    # The trainer may log NaN, for a gradient's norm for example; JSON has no word for it, Python's reader does.
    model_config = ConfigDict(ser_json_inf_nan="constants")
    once_unsealed: ClassVar[bool] = True

    resumed_from_step: int
    world_size: int
    parallelism: str
    precision: str
    device: str
    seconds: dict[str, float]
    """Wall clock by stage: worker_start, training, last_upload."""
    storage_retries: dict[str, int]
    """Requests to storage that rank 0 repeated, by what was wrong."""
    first_step_unix_seconds: float | None
    longest_batch_peak_bytes: int | None = None
    """Memory of rank 0's device at its peak while the longest micro-batch was tried; None if it was not, or on a
    CPU."""
    log_history: list[dict[str, Any]]
    """The trainer's log: one entry each `logging_steps`."""
    throughput: Throughput | None = None
    """Of all ranks, in all attempts that the model was trained by."""
