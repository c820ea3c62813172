"""Trying the longest micro-batch of a run before its first step, so that it cannot run out of memory later.

All ranks try the same micro-batch at the same time: forward and backward pass, clipping and optimizer step. It is tried
twice, because the optimizer's state is allocated at the end of the first step and is there during all others. Then
everything is put back (see saved_state.py): the run that follows has the same bits as one without the trial, except
that DistributedDataParallel then knows in which order gradients come, which may change how more than two ranks round
the sum of their gradients in the first step.

A rank that runs out of memory leaves a collective in which others wait. So it posts its failure in the store of the
process group, and every rank aborts its group soon after.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import itertools
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer

from tercet.artifacts.journal import as_tercet_error
from tercet.errors import BatchTooLarge, OutOfMemory, first_line
from tercet.failpoints import limit
from tercet.model.collectives import run_on_rank_0
from tercet.planning.estimates import size_text
from tercet.training.saved_state import SavedState

logger = logging.getLogger("tercet")

# How long a rank waits for the others to fail too. All of them try the same micro-batch, so they mostly do.
AGREE_SECONDS = 10.0
POLL_SECONDS = 0.2

# A process may try several runs in turn; the store is the same.
_trials = itertools.count()


@dataclass(frozen=True)
class Size:
    """The size of a micro-batch."""

    num_rows: int
    num_tokens: int
    num_pairs: int
    """Pairs of tokens of the same text."""


@dataclass(frozen=True)
class Shortage:
    """Where a rank ran out of memory."""

    rank: int
    size: Size
    peak_bytes: int | None
    """Most memory that tensors had at a time until then; None on a CPU."""
    available_bytes: int | None
    """Memory of the device."""
    message: str
    """What torch said, in one line."""

    def text(self) -> str:
        """Return one sentence with the numbers."""
        used = f"{size_text(self.peak_bytes)} were in use" if self.peak_bytes is not None else "memory was in use"
        has = f" of {size_text(self.available_bytes)}" if self.available_bytes is not None else ""
        return (
            f"the longest micro-batch of this run, {self.size.num_rows:,} rows with {self.size.num_tokens:,} tokens, "
            f"does not fit into the memory of rank {self.rank}: {used}{has} when more was needed ({self.message})"
        )


def try_longest_batch(trainer: Any, find: Callable[[], list[list[int]]], timeout_seconds: float) -> int | None:
    """Try the largest of the given micro-batches, and put everything back. Every rank must call it.

    find: returns micro-batches of row numbers; called on rank 0. Returns the peak memory of this rank's device in
    bytes, None on a CPU. Raises BatchTooLarge, on all ranks, where it does not fit on any of them."""
    started, device = time.monotonic(), trainer.args.device
    tried: list[tuple[list[int], Size]] = run_on_rank_0(lambda: _largest(trainer, find()))
    before = SavedState(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _agreement(trainer.args.process_index, timeout_seconds) as agreement:
        shortage: Shortage | None = None
        try:
            # The first once more: its first step ran without the optimizer's state.
            for rows, size in (tried[0], *tried):
                if (most := limit("longest_batch")) is not None and size.num_tokens > most:
                    raise torch.OutOfMemoryError(f"a limit of {most} tokens")
                _step(trainer, rows)
        except RuntimeError as error:
            if _is_shortage(error):
                shortage = _shortage(trainer, size, error)
            elif not agreement.has_failed():  # else: another rank left a collective
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the activations
        short = agreement.close(shortage)
    if short is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        too_large = BatchTooLarge(short.text())
        too_large.left_group = agreement.left_group
        raise too_large
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    before.put_back()
    if trainer.args.process_index == 0:
        size = max((size for _, size in tried), key=lambda each: each.num_tokens)
        used = "" if peak is None else f"; peak {size_text(peak)} of {size_text(_total_bytes(device))}"
        text = "the longest micro-batch fits: %d rows, %d tokens%s (tried in %.1f s)"
        logger.info(text, size.num_rows, size.num_tokens, used, time.monotonic() - started)
    return peak


def _step(trainer: Any, rows: list[int]) -> None:
    """Make a step of micro-batches of these rows, as the training would, but record nothing. A collective.

    Two micro-batches, if steps have several: the gradients of the first are there while the second is computed."""
    model, is_zero = trainer.model_wrapped, trainer.is_deepspeed_enabled
    num_micro_batches = min(trainer.args.gradient_accumulation_steps, 2)
    trainer.current_gradient_accumulation_steps = num_micro_batches
    for number in range(1, num_micro_batches + 1):
        is_last = number == num_micro_batches
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        alone = not is_last and not is_zero
        with trainer.accelerator.no_sync(model=model) if alone else contextlib.nullcontext():
            # Not the trainer's own, which records the rows.
            Trainer.training_step(trainer, model, trainer.laid_out(trainer.features_of(rows)))
    if trainer._embedding is not None:
        trainer._embedding.average()
    if trainer.args.max_grad_norm > 0:
        trainer._clip_grad_norm(model)
    trainer.optimizer.step()
    model.zero_grad()


def _largest(trainer: Any, candidates: list[list[int]]) -> list[tuple[list[int], Size]]:
    """Return the micro-batch with the most tokens, and the one with the most pairs if it is another."""
    sized = [(rows, _size(trainer.features_of(rows), len(rows))) for rows in candidates]
    by_tokens = max(sized, key=lambda each: (each[1].num_tokens, each[1].num_pairs))
    by_pairs = max(sized, key=lambda each: (each[1].num_pairs, each[1].num_tokens))
    return [by_tokens] if by_pairs[0] == by_tokens[0] else [by_pairs, by_tokens]


def _size(features: dict[str, Any], num_rows: int) -> Size:
    lengths = [
        np.diff(value) if name.endswith("cu_seq_lens_q") else value.sum(dim=1).numpy()
        for name, value in features.items()
        if name.endswith(("cu_seq_lens_q", "attention_mask"))
    ]
    of_texts = np.concatenate(lengths).astype(np.int64)
    return Size(num_rows, int(of_texts.sum()), int(np.square(of_texts).sum()))


def _is_shortage(error: RuntimeError) -> bool:
    return isinstance(as_tercet_error(error), OutOfMemory)


def _shortage(trainer: Any, size: Size, error: RuntimeError) -> Shortage:
    device = trainer.args.device
    on_gpu = device.type == "cuda"
    return Shortage(
        rank=trainer.args.process_index,
        size=size,
        peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        available_bytes=_total_bytes(device) if on_gpu else None,
        message=first_line(error),
    )


def _total_bytes(device: torch.device) -> int:
    total: int = torch.cuda.get_device_properties(device).total_memory
    return total


class _Agreement:
    """Makes all ranks learn of a shortage on any of them, through the store of the process group."""

    def __init__(self, rank: int, num_ranks: int, store: Any, timeout_seconds: float) -> None:
        self._rank, self._num_ranks, self._store, self._timeout_seconds = rank, num_ranks, store, timeout_seconds
        self._ended = threading.Event()
        self.left_group = False
        """Whether this rank's process group was aborted."""
        if num_ranks > 1:
            threading.Thread(target=self._watch, name="tercet-longest-batch", daemon=True).start()

    def has_failed(self) -> bool:
        """Return whether any rank has posted a shortage."""
        return self._num_ranks > 1 and self._store.check(["failed"])

    def close(self, shortage: Shortage | None) -> Shortage | None:
        """Post what this rank found, wait for the others, and return the first shortage of any rank."""
        if self._num_ranks == 1:
            return shortage
        if shortage is not None:
            self._store.set("failed", json.dumps(asdict(shortage)))
        self._store.set(f"rank {self._rank}", "ended")
        seconds = AGREE_SECONDS if self.has_failed() else self._timeout_seconds
        try:
            self._store.wait([f"rank {rank}" for rank in range(self._num_ranks)], datetime.timedelta(seconds=seconds))
        except RuntimeError:
            if not self.has_failed():
                raise
            self._leave_group()  # frees the ranks that wait for this one
        self._ended.set()
        if not self.has_failed():
            return None
        values = json.loads(self._store.get("failed"))
        return Shortage(**{**values, "size": Size(**values["size"])})

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if self.has_failed():
                if not self._ended.wait(AGREE_SECONDS):
                    self._leave_group()  # ends the collective in which this rank waits
                return

    def _leave_group(self) -> None:
        self.left_group = True
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._abort_process_group()


@contextlib.contextmanager
def _agreement(rank: int, timeout_seconds: float) -> Iterator[_Agreement]:
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    store = None
    if num_ranks > 1:
        own = dist.PrefixStore(f"tercet/longest_batch/{next(_trials)}", dist.distributed_c10d._get_default_store())
        store = own.clone()  # a connection of its own: the group's may be busy with a wait
    agreement = _Agreement(rank, num_ranks, store, timeout_seconds)
    try:
        yield agreement
    finally:
        agreement._ended.set()
