"""Find the micro-batches of a run that need the most memory, before the run begins.

Memory grows with the tokens of a micro-batch, or, where attention keeps its weights, with the pairs of tokens within a
text. The order of rows is a function, so every micro-batch of a run is known in advance. Ten million rows have too many
tokens to count at the start of a run, so batches are compared by the bytes of their texts, which Arrow's offsets give
without reading a text. Rows that trade places to keep equal texts apart (no_duplicates.py) are not followed in this
search; the micro-batches that it returns are made exactly.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tercet.data.order import DatasetRows, RankBatches, Rows, RowTokens, global_batches, num_steps_per_epoch

if TYPE_CHECKING:
    from datasets import Dataset

# A pass over 10 million rows takes 8 s in batches of 1,024 and 25 s in batches of 16 (one core of a Xeon).
# Later passes are not searched: they are independent shuffles of the same rows, so one is like another.
SEARCH_SECONDS = 30.0

# The longest by bytes of their texts, of which the caller counts the tokens.
NUM_CANDIDATES = 8

# English text has about four characters per token; texts are cut at the model's limit.
BYTES_PER_TOKEN = 4


def text_bytes(rows: Dataset) -> npt.NDArray[np.int32]:
    """Return the bytes of each text: shape (num_rows, num_columns). A null has 0. Reads no text."""
    columns = []
    for column in rows.data.columns:
        sizes = []
        for chunk in column.chunks:
            bounds = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            sizes.append(np.diff(bounds))
        columns.append(np.concatenate(sizes) if sizes else np.zeros(0, np.int32))
    stored = np.stack(columns, axis=1)
    return stored if rows._indices is None else stored[rows._indices.column(0).to_numpy()]


def longest_micro_batches(
    datasets: Sequence[DatasetRows],
    sizes: npt.NDArray[np.int32],
    num_epochs: int,
    global_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    seed: int,
    row_tokens: RowTokens | None = None,
    max_tokens: int | None = None,
    copies_last: bool = False,
) -> list[Rows]:
    """Return up to 2 * NUM_CANDIDATES micro-batches of single ranks: those that need the most memory in a run.

    sizes: bytes of each text, numbered across the concatenated datasets, as `text_bytes` returns them. The other
    arguments are those of `RankBatches`. max_tokens: texts are cut to this length."""
    if max_tokens is not None:
        sizes = np.minimum(sizes, int(min(max_tokens, 2**28)) * BYTES_PER_TOKEN)
    # By tokens, and by pairs of tokens.
    costs = np.stack([sizes.sum(axis=1, dtype=np.int64), np.square(sizes, dtype=np.int64).sum(axis=1)], axis=1)
    ends_at = time.monotonic() + SEARCH_SECONDS
    micro_batch_size = global_batch_size // gradient_accumulation_steps
    longest: list[list[tuple[int, int, int, int, int]]] = [[], []]
    offset = 0
    for dataset, rows in enumerate(datasets):
        per_pass = num_steps_per_epoch(rows.num_rows, global_batch_size, keeps_last=rows.keeps_last)
        num_steps = num_epochs * rows.num_steps_per_epoch
        for pass_number in range(-(-num_steps // per_pass) if per_pass else 0):
            if pass_number and time.monotonic() > ends_at:
                break
            batches = global_batches(
                rows.num_rows, global_batch_size, seed, pass_number, dataset=dataset, keeps_last=rows.keeps_last
            )
            for step, batch in enumerate(batches):
                if pass_number * per_pass + step >= num_steps or (step % 1000 == 999 and time.monotonic() > ends_at):
                    break
                of_micro = np.add.reduceat(costs[batch + offset], range(0, len(batch), micro_batch_size))
                if copies_last and len(batch) < global_batch_size:
                    of_micro *= world_size  # each rank gets all of it
                for kind in (0, 1):
                    micro = int(of_micro[:, kind].argmax())
                    entry = (int(of_micro[micro, kind]), dataset, pass_number, step, micro)
                    if len(longest[kind]) < NUM_CANDIDATES:
                        heapq.heappush(longest[kind], entry)
                    elif entry > longest[kind][0]:
                        heapq.heapreplace(longest[kind], entry)
        offset += rows.num_rows
    samplers = [
        RankBatches(
            datasets, global_batch_size, gradient_accumulation_steps, rank, world_size, seed, row_tokens, copies_last
        )
        for rank in range(world_size)
    ]
    offsets = np.cumsum([0, *(rows.num_rows for rows in datasets)])
    chosen: dict[tuple[int, int, int, int], Rows] = {}
    for kind, entries in enumerate(longest):
        for _, dataset, pass_number, step, micro in sorted(entries, reverse=True):
            if (dataset, pass_number, step, micro) in chosen:
                continue
            rows = datasets[dataset]
            batch = next(
                global_batches(
                    rows.num_rows,
                    global_batch_size,
                    seed,
                    pass_number,
                    rows.text_ids,
                    dataset,
                    start_step=step,
                    keeps_last=rows.keeps_last,
                )
            )
            batch = batch + offsets[dataset]
            of_ranks = [np.array(list(sampler.micro_batches(batch))[micro], dtype=np.int64) for sampler in samplers]
            chosen[dataset, pass_number, step, micro] = max(of_ranks, key=lambda own: int(costs[own, kind].sum()))
    return list(chosen.values())
