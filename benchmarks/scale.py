"""What grows with the number of GPUs: measured for simulated ranks on one core, and computed from cited rates.

python benchmarks/scale.py [--rows-per-gpu 64]

Measured here, for 1 to 1,024 ranks: the time to choose the rows of a rank's next micro-batch, with the division of the
global batch by tokens; the time to keep equal texts apart within a block of the order (`no_duplicates`); the storage
requests of a checkpoint that every rank writes a part of, and how long rank 0 needs to commit it. The ranks are
simulated one after the other on a local folder; only the number of requests carries over to object storage, not their
time.

Computed: the step of BERT-large with data parallelism: products at a share of the peak, the rest at a share of the
memory's rate, or the host's launches where these take longer. Gradients are averaged in fp32 by a ring; every rank
sends 2 (n - 1) / n times the gradients (Patarasuk & Yuan 2009). DDP sends each bucket as soon as it is ready, so only
what takes longer than the backward pass, two thirds of the rest of the step, adds to it, and the last bucket of 25 MB.
The rates are at the top of the file, each with its source; docs/scale.md says what follows from them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

NUM_RANKS = (1, 8, 64, 256, 1024)
MAX_RANKS_APART = 256  # beyond, a block takes minutes
GPUS_PER_MACHINE = 8

# BERT-large, as in benchmarks/gpu.py. stella_en_400M_v5 has 434e6 weights, 403e6 of them in its gated layers.
NUM_LAYERS, HIDDEN_SIZE, NUM_WEIGHTS, NUM_LAYER_WEIGHTS = 24, 1024, 334e6, 302e6
TOKENS_PER_TRIPLET = {"card": 67, "longer": 170}  # of step.py, and texts of 57 tokens
BATCH_SIZES = (16, 64, 256, 1024)
GRADIENT_BYTES = 4 * NUM_WEIGHTS
LAST_BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's default

# One H100 SXM. NVIDIA's datasheet: 989 TFLOP/s of dense bf16 and 3.35 TB/s.
PEAK_FLOPS = 989e12
# Assumed, until benchmarks/gpu.py has run: products of these sizes at 63 % of the peak, memory at 90 %; bytes that
# everything but products and attention moves for each token, unit and layer, forward and backward, eager and fused;
# a kernel's launch.
PRODUCT_FLOPS, MEMORY_BYTES_PER_SECOND = 0.63 * PEAK_FLOPS, 0.9 * 3.35e12
BYTES_PER_UNIT = {"eager": 150, "fused": 75}
LAUNCH_SECONDS = 5e-6
KERNELS_PER_LAYER = 54  # counted: tests/unit/training/test_step_without_waiting.py
# AdamW reads weight, gradient and two moments, and writes all but the gradient: 28 bytes a weight. Norms read the
# gradient, clipping reads and writes it, the cast to 16 bits reads 4 and writes 2, the gradient is set to zero: 46.
OPTIMIZER_BYTES = 46 * NUM_WEIGHTS

# Bytes a second that a ring moves through one GPU ("bus bandwidth" of nccl-tests).
NVLINK = 470e9  # 460 to 480 GB/s on 8 H100 with NVSwitch (docs.alayanew.com, tech blog of 2026-05-06)
# Between machines, shared by the GPUs of a machine: EFA of a p5.48xlarge (3,200 Gbit/s) at an assumed 80 %, and the
# plain networks of smaller machines at an assumed 90 %.
BETWEEN = {"EFA 3,200 Gbit/s": 0.8 * 400e9, "100 Gbit/s": 0.9 * 12.5e9, "25 Gbit/s": 0.9 * 3.125e9}


def order(num_ranks: int, rows_per_gpu: int) -> None:
    """Print the time of a rank to choose the rows of its next micro-batch, and to keep equal texts apart in a block.

    Anchors and positives are unique; a row's negative is the positive of another one. Every rank does the same work."""
    from tercet.data.no_duplicates import without_duplicates
    from tercet.data.order import MIN_STEPS_PER_BLOCK, ROWS_PER_BLOCK, DatasetRows, RankBatches

    global_batch_size = num_ranks * rows_per_gpu
    num_steps = max(MIN_STEPS_PER_BLOCK, ROWS_PER_BLOCK // global_batch_size)
    num_rows = global_batch_size * num_steps
    draw = np.random.default_rng(0)
    tokens = draw.lognormal(4, 0.5, num_rows).astype(np.int64)
    batches = RankBatches(
        [DatasetRows(num_rows, num_steps)],
        *(global_batch_size, 1, 0, num_ranks, 0),
        row_tokens=(lambda rows: tokens[rows]) if num_ranks > 1 else None,
    )
    seconds, made = [], iter(batches)
    for _ in range(12):
        started = time.perf_counter()
        next(made)
        seconds.append(time.perf_counter() - started)
    shown = f"{num_ranks:>6} {1e3 * statistics.median(seconds[1:]):>10.2f}"
    if num_ranks <= MAX_RANKS_APART:
        rows = np.arange(num_rows)
        texts = np.stack([rows, num_rows + rows, num_rows + draw.integers(num_rows, size=num_rows)], axis=1)
        started = time.perf_counter()
        without_duplicates(texts, num_steps, global_batch_size)
        apart = time.perf_counter() - started
        shown += f" {apart:>12.2f} {1e3 * apart / num_steps:>12.2f}"
    print(shown, flush=True)


def checkpoint(num_ranks: int) -> None:
    """Write a checkpoint with a small file of each rank, and print its requests and the time to commit it."""
    from tercet.artifacts.checkpoint import commit_step, upload_part
    from tercet.artifacts.lease import Attempt
    from tercet.storage import open_storage
    from tercet.storage.layout import attempt_folder

    with tempfile.TemporaryDirectory(prefix="tercet-scale-") as name:
        storage, counts = open_storage(f"file://{name}/store"), Counter[str]()
        for method in (
            "put",
            "put_if_absent",
            "upload",
            "read",
            "read_versioned",
            "compare_and_swap",
            "list",
            "exists",
        ):
            _count(storage, method, counts)
        attempt = Attempt(name="0" * 12, generation=1, first_step=0, world_size=num_ranks)
        folder = attempt_folder("run", 1, attempt.name)
        for rank in range(num_ranks):
            local = Path(name) / f"rank-{rank}"
            local.mkdir()
            for kind in ("optimizer", "ledger", "rng_state"):
                (local / f"{kind}-{rank}").write_bytes(b"x")
            upload_part(storage, local, folder, rank)
        of_ranks = sum(counts.values()) / num_ranks
        counts.clear()
        started = time.perf_counter()
        commit = commit_step(storage, "run", 1, 1.0, {}, (attempt,))
        seconds = time.perf_counter() - started
        size = len(commit.model_dump_json())
        print(f"{num_ranks:>6} {of_ranks:>14.0f} {sum(counts.values()):>15} {seconds:>14.2f} {size / 2**10:>14.0f}")


def _count(storage: Any, method: str, counts: Counter[str]) -> None:
    original = getattr(storage, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[method] += 1
        return original(*args, **kwargs)

    setattr(storage, method, counted)


def card_seconds(num_tokens: float, way: str) -> tuple[float, float]:
    """Return the seconds of a step of one card, and of its arithmetic at peak.

    A fused step is one launch. Otherwise the host's launches can take longer than the card."""
    flops = 6 * NUM_LAYER_WEIGHTS * num_tokens
    moved = BYTES_PER_UNIT[way] * HIDDEN_SIZE * NUM_LAYERS * num_tokens + OPTIMIZER_BYTES
    device = flops / PRODUCT_FLOPS + moved / MEMORY_BYTES_PER_SECOND
    host = LAUNCH_SECONDS * KERNELS_PER_LAYER * NUM_LAYERS if way == "eager" else 0.0
    return max(device, host), flops / PEAK_FLOPS


def card() -> None:
    """Print the time of a step on one card."""
    names = (("texts", 8), ("triplets", 8), ("tokens", 8), ("at peak ms", 11))
    names += (("eager ms", 9), ("of peak", 8), ("fused ms", 9), ("of peak", 8))
    print("\n" + " ".join(f"{name:>{width}}" for name, width in names))
    for texts, tokens_per_triplet in TOKENS_PER_TRIPLET.items():
        for rows in BATCH_SIZES:
            (eager, at_peak), (fused, _) = (card_seconds(rows * tokens_per_triplet, way) for way in BYTES_PER_UNIT)
            print(
                f"{texts:>8} {rows:>8} {rows * tokens_per_triplet:>8} {1e3 * at_peak:>11.1f} {1e3 * eager:>9.1f}"
                f" {at_peak / eager:>8.0%} {1e3 * fused:>9.1f} {at_peak / fused:>8.0%}"
            )


def all_reduce_seconds(num_ranks: int, num_bytes: float, between: float) -> float:
    """Return the time to average gradients: within machines over NVLink, then between them by all GPUs at once.

    between: bytes a second of a whole machine's network. Each GPU of a machine sends its share of the gradients."""
    within = min(num_ranks, GPUS_PER_MACHINE)
    seconds = 2 * (within - 1) / within * num_bytes / NVLINK
    num_machines = -(-num_ranks // GPUS_PER_MACHINE)
    if num_machines > 1:
        seconds += 2 * (num_machines - 1) / num_machines * num_bytes / between
    return seconds


def steps() -> None:
    """Print what the average of the gradients adds to an eager step on the card's texts, by network, rows and GPUs."""
    print(f"\n{'network':<18} {'rows/GPU':>8} {'GPUs':>6} {'all-reduce ms':>14} {'exposed ms':>11} {'efficiency':>11}")
    for network, between in BETWEEN.items():
        for rows in BATCH_SIZES[1:]:
            alone, _ = card_seconds(rows * TOKENS_PER_TRIPLET["card"], "eager")
            backward = 2 / 3 * (alone - OPTIMIZER_BYTES / MEMORY_BYTES_PER_SECOND)
            for num_ranks in NUM_RANKS[1:]:
                if num_ranks == GPUS_PER_MACHINE and network != next(iter(BETWEEN)):
                    continue  # one machine: its network does not matter
                total = all_reduce_seconds(num_ranks, GRADIENT_BYTES, between)
                last = all_reduce_seconds(num_ranks, LAST_BUCKET_BYTES, between)
                exposed = max(last, total - backward)
                shown = f"{1e3 * total:>14.1f} {1e3 * exposed:>11.1f} {alone / (alone + exposed):>11.0%}"
                print(f"{network:<18} {rows:>8} {num_ranks:>6} {shown}")


def main() -> None:
    """Measure and compute."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows-per-gpu", type=int, default=64)
    arguments = parser.parse_args()
    print(f"{'ranks':>6} {'rows ms':>10} {'block s':>12} {'a step ms':>12}   (block: keep equal texts apart)")
    for num_ranks in NUM_RANKS:
        order(num_ranks, arguments.rows_per_gpu)
    print(f"\n{'ranks':>6} {'requests/rank':>14} {'of the commit':>15} {'its seconds':>14} {'COMMIT KiB':>14}")
    for num_ranks in NUM_RANKS:
        checkpoint(num_ranks)
    card()
    steps()


if __name__ == "__main__":
    main()
