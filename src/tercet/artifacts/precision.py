"""The precision that a run chose when it began. A run keeps it on every machine."""

from __future__ import annotations

from typing import Literal

from tercet.errors import ObjectNotFound, PlanError
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, unseal


class Precision(Document):
    """precision.json: what was chosen, and why. Missing where the recipe names a precision, and where it names none and
    the run began on a CPU: then it is fp32."""

    precision: Literal["fp32", "tf32", "bf16"]
    speed_up: float | None = None
    """Time in fp32 ÷ time in the chosen precision; if that is fp32, in the fastest other one (0.0: the device has no
    other). None where nothing was measured, because the recipe names no precision."""
    device: str

    @property
    def reason(self) -> str:
        """Why it was chosen, in words."""
        if self.speed_up is None:
            return f"training.precision is not set; this is the default on {self.device}"
        if self.precision == "fp32":
            return f"no other precision is clearly faster: {self.speed_up:.1f} times as fast on {self.device}"
        return f"{self.precision} is {self.speed_up:.1f} times as fast as fp32 on {self.device}"


def read_precision(storage: Storage, run_id: str) -> Precision | None:
    """Return the precision that a run chose when it began, or None if it stored none. Raises CorruptObject."""
    key = layout.precision_key(run_id)
    try:
        return unseal(Precision, storage.read(key), storage.uri_of(key), hint="choose a new --run-id")
    except ObjectNotFound:
        return None


def check_same_precision(storage: Storage, run_id: str, named: str | None) -> None:
    """Raise PlanError if the recipe names another precision than the run began with.

    named: `training.precision`. The recipe hash does not show this change: a recipe without a precision has the hash of
    one with fp32."""
    if named in (None, "auto"):
        return
    kept = read_precision(storage, run_id)
    if kept is not None and kept.precision != named:
        raise PlanError(
            f"training.precision is {named}, but run {run_id} began with {kept.precision} ({kept.reason})",
            hint="omit training.precision to resume the run as it began, or choose a new --run-id",
        )
