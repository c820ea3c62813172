"""Counts what a rank trains on and where its time goes. It reads clocks and shapes, and never waits for the device."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tercet.artifacts.throughput import TRAINING_PHASES, Phase, Throughput, of_all_ranks
from tercet.training.peak import Peak


class BatchSize(NamedTuple):
    """What a rank's batch holds. Sizes can be added up."""

    num_rows: int
    num_tokens: int
    """Tokens of texts, without padding."""
    num_pairs: int
    """Pairs of tokens that attend to each other, summed over the layers of the model."""


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point operations that a step needs, from the model's size.

    A token takes 2 operations for each weight in the forward pass, and 4 in the backward pass: 2 for the gradient of
    the weight, which a frozen one does not need, and 2 for that of its input. A pair of tokens takes 4 operations for
    each channel of attention forward, and 8 backward. Embeddings are looked up, which is none. So PaLM counts
    (Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T for each token), for full attention. What is computed again to
    save memory does not count, but the first forward pass of a loss with gradient caching does: it needs two."""

    num_weights: int
    """Of the encoder, without embeddings."""
    num_trained_weights: int
    attention_width: int
    """Number of heads times the width of a head."""
    windows: tuple[int | None, ...]
    """For each layer, how many tokens a token attends to; None for all of its text."""
    is_causal: bool = False
    num_forward_passes: int = 1

    def flops(self, num_tokens: int, num_pairs: int) -> float:
        """Return the operations of a step. num_pairs: summed over layers."""
        of_token = 2 * self.num_forward_passes * self.num_weights + 2 * self.num_weights + 2 * self.num_trained_weights
        of_pair = 4 * (self.num_forward_passes + 2) * self.attention_width
        return float(of_token * num_tokens + of_pair * num_pairs)

    def num_pairs(self, lengths: npt.NDArray[Any]) -> int:
        """Return the pairs of tokens of all texts and layers. lengths: tokens of each text, shape (num_texts,)."""
        lengths, total = lengths.astype(np.int64), 0
        for window in {*self.windows}:
            pairs = int((lengths * (lengths if window is None else np.minimum(lengths, window))).sum())
            total += self.windows.count(window) * (pairs // 2 if self.is_causal else pairs)
        return total


def arithmetic_of(model: Any, is_cached: bool) -> Arithmetic:
    """Return the arithmetic of a SentenceTransformer that is not wrapped yet.

    is_cached: the loss runs the model once without a graph, and again with one."""
    encoder = getattr(model[0], "model", None)
    config = getattr(encoder, "config", None)
    # A pooler, where there is one, takes one token of a text.
    unused = [m for m in (getattr(encoder, "pooler", None),) if isinstance(m, torch.nn.Module)]
    unused += [m for m in model[0].modules() if isinstance(m, torch.nn.Embedding)]
    excluded = {id(weight) for module in unused for weight in module.parameters()}
    weights = [weight for weight in model[0].parameters() if id(weight) not in excluded]
    num_heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // num_heads if num_heads else 0)
    num_layers = getattr(config, "num_hidden_layers", None) or 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    window = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return Arithmetic(
        num_weights=sum(weight.numel() for weight in weights),
        num_trained_weights=sum(weight.numel() for weight in weights if weight.requires_grad),
        attention_width=num_heads * width,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        is_causal=bool(getattr(config, "is_decoder", False)),
        num_forward_passes=2 if is_cached else 1,
    )


class Meter:
    """The throughput of one rank in this attempt.

    The training thread is in exactly one phase at a time, so the times of all phases add up to the wall clock. On a
    GPU the host runs ahead of the device, and meets it where the trainer reads the loss, at a line of the log: times
    are exact between such lines, not from step to step."""

    def __init__(self, arithmetic: Arithmetic, peak: Peak, device: torch.device) -> None:
        """To be made on every rank, just before the training."""
        self._arithmetic, self._peak, self._device = arithmetic, peak, device
        self._seconds: dict[Phase, float] = {}
        self._phase: Phase = "start"
        self._since = time.monotonic()
        self._size = BatchSize(0, 0, 0)
        self._num_steps = self._num_positions = 0
        self._wrapped: Any = None
        self._exposed_seconds = 0.0
        self._before_line = Throughput()
        self.own_line = self.line = Throughput()
        """What happened between the last two lines of the log: on this rank, and on all of them."""

    def start(self) -> None:
        """Begin to measure now."""
        self._since = time.monotonic()

    def watch(self, wrapped: Any) -> None:
        """Ask DDP, in each reading, how long backward passes waited for other ranks. wrapped: what `forward` calls."""
        self._wrapped = wrapped

    def count_positions(self, model: Any) -> None:
        """Count the tokens that each forward pass of the training computes, padding included, by their shape."""

        def count(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            features = arguments[0]
            ids = features["row"]["input_ids"] if "row" in features else features.get("input_ids")
            if module.training and ids is not None:
                self._num_positions += ids.numel()

        model[0].register_forward_pre_hook(count)

    def sizes(self, batches: Sequence[Mapping[str, Any]]) -> list[BatchSize]:
        """Return the size of each collated batch. Reads host memory only, so it may run in another thread."""
        return [_size(batch, self._arithmetic) for batch in batches]

    def add(self, sizes: Sequence[BatchSize]) -> None:
        """Count the batches of one step."""
        if self._phase == "start":
            self._switch("compute")
            self._num_positions = 0  # forward passes until now were no steps, such as that of the longest batch
        for size in sizes:
            self._size = BatchSize(*(mine + its for mine, its in zip(self._size, size, strict=True)))

    def close_step(self) -> None:
        """Count an optimizer step."""
        self._num_steps += 1

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Inside the block, this thread is in a phase; then in the one before again."""
        before = self._phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def finish_device(self) -> None:
        """Wait for the device, so that its steps count as compute, not as what follows. Not for use within a step."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def reading(self) -> Throughput:
        """Return the throughput of this rank since the meter was made."""
        self._switch(self._phase)
        seconds = dict(self._seconds)
        # Never less than before: the mean changes as DDP measures more steps.
        exposed = max(self._exposed_seconds, self._num_steps * exposed_seconds(self._wrapped))
        self._exposed_seconds = exposed = min(exposed, seconds.get("compute", 0.0))
        if exposed:
            seconds["compute"] -= exposed
            seconds["ranks"] = seconds.get("ranks", 0.0) + exposed
        num_tokens = self._size.num_tokens
        num_positions = self._num_positions // self._arithmetic.num_forward_passes
        return Throughput(
            num_steps=self._num_steps,
            num_rows=self._size.num_rows,
            num_tokens=num_tokens,
            num_padding_tokens=max(num_positions - num_tokens, 0),
            flops=self._arithmetic.flops(num_tokens, self._size.num_pairs),
            peak_flops=self._peak.flops_per_second * sum(seconds.get(phase, 0.0) for phase in TRAINING_PHASES),
            peak_source=self._peak.source,
            seconds=seconds,
            peak_memory_bytes=self._peak_memory_bytes(),
        )

    def close_line(self, gather: Callable[[Any], list[Any]]) -> Throughput:
        """Return the throughput of all ranks since this was called before. Every rank must call it.

        gather: returns the objects of all ranks, and needs no GPU."""
        now = self.reading()
        self.own_line, self._before_line = now.since(self._before_line), now
        with self.phase("ranks"):
            self.line = of_all_ranks(gather(self.own_line))
        return self.line

    def _switch(self, phase: Phase) -> None:
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def _peak_memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def _size(batch: Mapping[str, Any], arithmetic: Arithmetic) -> BatchSize:
    """Return the size of a micro-batch: made ahead as a whole, or columns such as `anchor_input_ids`."""
    if "batch" in batch:
        whole = batch["batch"]
        lengths = np.asarray(whole.lengths)
        return BatchSize(whole.num_texts[0], int(lengths.sum()), arithmetic.num_pairs(lengths))
    size = BatchSize(0, 0, 0)
    for name, value in batch.items():
        if name.endswith("cu_seq_lens_q"):
            lengths = np.diff(np.asarray(value))
        elif name.endswith("attention_mask") and value.ndim == 2:
            lengths = np.asarray(value.sum(dim=1))
        else:
            continue
        num_tokens, num_pairs = int(lengths.sum()), arithmetic.num_pairs(lengths)
        size = BatchSize(len(lengths), size.num_tokens + num_tokens, size.num_pairs + num_pairs)
    return size


def exposed_seconds(model: Any) -> float:
    """Return the mean time for which a backward pass waits for the gradients of other ranks, after its own computation.

    0 for a model that DistributedDataParallel does not wrap. DDP measures it, in its first ten backward passes and in
    each hundredth one. Reading it waits for nothing."""
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return 0.0
    data = model._get_ddp_logging_data()
    nanoseconds = data.get("avg_backward_comm_time", 0) - data.get("avg_backward_compute_comm_overlap_time", 0)
    return max(float(nanoseconds), 0.0) / 1e9
