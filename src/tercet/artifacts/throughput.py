"""How fast a run trained, and where its time went: counted by each rank, added up over ranks and attempts."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from tercet.storage.documents import Frozen

Phase = Literal["compute", "data", "ranks", "storage", "evaluation", "start"]
"""What the training thread of a rank does at one time.

- `compute`: steps, and everything that is none of the others
- `data`: waits for the next batch
- `ranks`: waits for other ranks, as far as the host can see it; see `Meter`
- `storage`: hands a checkpoint over, and waits for uploads
- `evaluation`: measures the model on the eval split
- `start`: from the beginning of the training to its first step"""

TRAINING_PHASES: tuple[Phase, ...] = ("compute", "data", "ranks")
"""The phases of a step: rates are per second of these. Evaluations and checkpoints are shown apart."""


class Throughput(Frozen):
    """Counts and times of some steps of a run. Counts are sums over ranks; seconds are the mean of the ranks."""

    num_steps: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    """Tokens of texts."""
    num_padding_tokens: int = 0
    """Tokens that fill rows up to equal lengths, in the first forward pass of a step."""
    flops: float = 0.0
    """Floating-point operations that the tokens of texts need: see docs/throughput.md."""
    peak_flops: float = 0.0
    """Floating-point operations that the devices could have done in the same time, at their peak."""
    peak_source: str = ""
    """Where the peak comes from: a GPU's datasheet, or a product of matrices that was measured."""
    seconds: dict[Phase, float] = Field(default_factory=dict)
    """Wall clock by phase. Adds up to the time in which the steps were made."""
    peak_memory_bytes: int = 0
    """The most memory that a rank had allocated: of its GPU, or of its process on a CPU."""

    @property
    def training_seconds(self) -> float:
        """Wall clock of the steps, without evaluations and checkpoints."""
        return sum(self.seconds.get(phase, 0.0) for phase in TRAINING_PHASES)

    @property
    def steps_per_second(self) -> float:
        """Optimizer steps per second of training."""
        return _ratio(self.num_steps, self.training_seconds)

    @property
    def rows_per_second(self) -> float:
        """Rows, such as triplets, per second of training, of all ranks together."""
        return _ratio(self.num_rows, self.training_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of texts per second of training, of all ranks together."""
        return _ratio(self.num_tokens, self.training_seconds)

    @property
    def share_of_peak(self) -> float:
        """Floating-point operations done ÷ those possible, from 0 to 1."""
        return _ratio(self.flops, self.peak_flops)

    @property
    def share_of_padding(self) -> float:
        """Tokens of padding ÷ all tokens of the forward pass, from 0 to 1."""
        return _ratio(self.num_padding_tokens, self.num_padding_tokens + self.num_tokens)

    def share_of_time(self, phase: Phase) -> float:
        """Time of one phase ÷ time of training and checkpoints, from 0 to 1. Not for `evaluation` and `start`."""
        return _ratio(self.seconds.get(phase, 0.0), self.training_seconds + self.seconds.get("storage", 0.0))

    def then(self, later: Throughput) -> Throughput:
        """Return both together: this one, and what came after it."""
        return self._combined(later, 1)

    def since(self, earlier: Throughput) -> Throughput:
        """Return what came after `earlier`, which is a beginning of this one."""
        return self._combined(earlier, -1)

    def _combined(self, other: Throughput, sign: int) -> Throughput:
        phases = {*self.seconds, *other.seconds}
        return Throughput(
            num_steps=self.num_steps + sign * other.num_steps,
            num_rows=self.num_rows + sign * other.num_rows,
            num_tokens=self.num_tokens + sign * other.num_tokens,
            num_padding_tokens=self.num_padding_tokens + sign * other.num_padding_tokens,
            flops=self.flops + sign * other.flops,
            peak_flops=self.peak_flops + sign * other.peak_flops,
            peak_source=(other if sign > 0 else self).peak_source or self.peak_source,
            seconds={p: self.seconds.get(p, 0.0) + sign * other.seconds.get(p, 0.0) for p in sorted(phases)},
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
        )


def of_all_ranks(readings: Iterable[Throughput]) -> Throughput:
    """Return the throughput of the ranks together, each of which made the same steps."""
    ranks = list(readings)
    total = functools.reduce(Throughput.then, ranks)
    seconds = {phase: seconds / len(ranks) for phase, seconds in total.seconds.items()}
    return total.model_copy(update={"num_steps": ranks[0].num_steps, "seconds": seconds})


def peak_text(throughput: Throughput) -> str:
    """Return the share of the peak in words: `38 % of the peak of H100 SXM in bf16`."""
    return f"{throughput.share_of_peak:.0%} of {throughput.peak_source}".replace("%", " %", 1)


def waits_text(throughput: Throughput) -> str:
    """Return the shares of time that steps waited, in words: `data 0.1 %, ranks 2.0 %, storage 0.0 %`."""
    waits: tuple[Phase, ...] = ("data", "ranks", "storage")
    return ", ".join(f"{phase} {100 * throughput.share_of_time(phase):.1f} %" for phase in waits)


def log_entry(throughput: Throughput) -> dict[str, float]:
    """Return rates and shares as the trainer's log has them, beside loss and learning rate."""
    values = {
        "steps_per_second": throughput.steps_per_second,
        "rows_per_second": throughput.rows_per_second,
        "tokens_per_second": throughput.tokens_per_second,
        "share_of_peak": throughput.share_of_peak,
        "share_of_padding": throughput.share_of_padding,
        "waiting_for_data": throughput.share_of_time("data"),
        "waiting_for_ranks": throughput.share_of_time("ranks"),
        "waiting_for_storage": throughput.share_of_time("storage"),
    }
    return {
        **{name: round(value, 4) for name, value in values.items()},
        "peak_memory_bytes": throughput.peak_memory_bytes,
    }


def rates_text(throughput: Throughput) -> str:
    """Return rates in words: `148 rows/s  12,345 tokens/s`."""
    rows = throughput.rows_per_second
    return f"{rows:,.{0 if rows >= 100 else 1}f} rows/s  {throughput.tokens_per_second:,.0f} tokens/s"


def line_text(throughput: Throughput) -> str:
    """Return what a line of the training shows: rates, share of the peak, waits, memory."""
    memory = f"memory {throughput.peak_memory_bytes / 1e9:.1f} GB"
    return f"{rates_text(throughput)}  {peak_text(throughput)}  waits: {waits_text(throughput)}  {memory}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
