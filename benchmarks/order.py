"""The order of rows: rows a second on one core beside the trainer's own sampler, and a billion rows for 1,024 ranks.

python benchmarks/order.py [--runs 5] [--billion]

Triplets with ten rows an anchor, global batches of 512. The trainer's sampler is NO_DUPLICATES of
sentence-transformers, on fewer rows. `--billion` makes every global batch of 1e9 rows once and cuts it for all ranks
(about five minutes). Memory is the growth of this process's peak resident set.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

from tercet.data.order import Rows, global_batches, rank_micro_batches

BATCH_SIZE = 512
NUM_ROWS = 1_000_000
NUM_ROWS_OF_TRAINER = 10_000


def text_ids(rows: Rows) -> Rows:
    """Rows with ten rows for each anchor, and unique positives and negatives."""
    return np.stack([rows // 10, 2**40 + rows, 2**41 + rows], axis=1)


def trainer_sampler() -> Iterable[list[int]]:
    """The sampler of `batch_sampler="no_duplicates"`, on rows with the same share of repeated anchors."""
    texts = {name: [f"{name} {number}" for number in range(NUM_ROWS_OF_TRAINER)] for name in ("positive", "negative")}
    texts["anchor"] = [f"anchor {number // 10}" for number in range(NUM_ROWS_OF_TRAINER)]
    return NoDuplicatesBatchSampler(Dataset.from_dict(texts), BATCH_SIZE, drop_last=True)  # type: ignore[no-any-return]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def count(batches: Iterable[object]) -> int:
    """Consume all batches."""
    return sum(1 for _ in batches)


def main() -> None:
    """Interleave the runs, then print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--billion", action="store_true")
    arguments = parser.parse_args()
    whole = range(NUM_ROWS)
    ids_in_memory = text_ids(np.array(whole))
    trainer = trainer_sampler()
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "tercet, no text twice in a batch": (
            NUM_ROWS,
            lambda: count(global_batches(NUM_ROWS, BATCH_SIZE, 42, 0, ids_in_memory.__getitem__)),
        ),
        "tercet, texts may repeat": (NUM_ROWS, lambda: count(global_batches(NUM_ROWS, BATCH_SIZE, 42, 0))),
        "sentence-transformers, NO_DUPLICATES": (NUM_ROWS_OF_TRAINER, lambda: count(trainer)),
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.runs):
        for name, (num_rows, work) in ways.items():
            measured[name].append(num_rows / seconds(work))
    base = statistics.median(measured["sentence-transformers, NO_DUPLICATES"])
    for name, rates in measured.items():
        rate = statistics.median(rates)
        print(f"{name:<40} {rate:>12,.0f} rows/s  {rate / base:>8.1f} times  (of {arguments.runs} runs)")
    for step in (1, 1000, 1_900_000):
        start = seconds(lambda step=step: next(global_batches(10**9, BATCH_SIZE, 42, 0, text_ids, start_step=step)))
        print(f"first batch from step {step:>9,} of a billion rows: {start:.3f} CPU s")
    if arguments.billion:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        num_ranks, batch_size, num_seen = 1024, 8192, 0

        def all_ranks() -> None:
            nonlocal num_seen
            for batch in global_batches(10**9, batch_size, 42, 0):
                num_seen += sum(rank_micro_batches(batch, rank, num_ranks, 1).size for rank in range(num_ranks))

        taken = seconds(all_ranks)
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
        print(f"1e9 rows, {num_ranks:,} ranks, batches of {batch_size:,}: {num_seen:,} rows dealt in {taken:.0f} CPU s")
        print(f"largest resident set: +{grown_mib:.0f} MiB")


if __name__ == "__main__":
    main()
