"""What one GPU shows in eight minutes: kernels, steps beside the plain trainer, waits, memory, graphs. Writes JSON.

python benchmarks/gpu.py [--out gpu.json] [--seconds 460] [--only steps waits] [--skip tests]
python benchmarks/gpu.py --device cpu      a dry run: every section with tiny sizes, on any machine

Needs neither Ray nor DeepSpeed. The attention that no GPU has proved yet is switched on; TERCET_FUSED_ATTENTION=0
switches it off. Sections run in the order of what they decide. Each is timed, an error in one does not
end the others, and none begins after `--seconds`. The exit code is 1 if a section failed.

The steps are those of a 334 M encoder (BERT's layers: 24 of width 1,024, dropout 0.1) on triplets whose lengths are
those of a published model card (step.py). `plain` is SentenceTransformerTrainer as it comes, with padded columns and
torch's scaled_dot_product_attention; where flash-attn is installed, `plain_flash` is the same with rows that
sentence-transformers flattens by itself. They train in one process and take turns, round by round; a round is timed
between two waits for the device, and nothing else waits. Share of peak: 6 floating-point operations a weight of the
encoder's layers and real token (forward 2, backward 4; Kaplan et al. 2020, section 2.1), over the time, and over the
rate that one large product of matrices reaches in bf16 on the same device in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TERCET_FUSED_ATTENTION", "1")

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from step import Turns, draw_lengths, make_rows
from tercet.model.libraries import import_quietly

REPOSITORY = Path(__file__).parent.parent
WAYS = ("plain", "tercet")
FLASH = "plain_flash"  # sentence-transformers' own rows without padding, where flash-attn is installed


class Size(NamedTuple):
    """How large everything is."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocabulary: int
    batch_sizes: tuple[int, ...]
    num_steps: int
    num_rounds: int
    num_trials: int
    num_texts: int
    product: int


ON_GPU = Size(24, 1024, 16, 30_522, (16, 64, 256), 8, 3, 20, 4096, 8192)
DRY_RUN = Size(2, 32, 2, 2_000, (4,), 1, 1, 1, 16, 64)


class Bench:
    """The device, the sizes, and the rows of the result."""

    def __init__(self, device: str, folder: Path, ends_at: float) -> None:
        self.device, self.folder = torch.device(device), folder
        self.is_gpu = self.device.type == "cuda"
        self.size = ON_GPU if self.is_gpu else DRY_RUN
        self.ends_at = ends_at
        self.rows: list[dict[str, Any]] = []
        self.ways = WAYS if not (self.is_gpu and is_flash_attn_2_available()) else (*WAYS, FLASH)

    def record(self, what: str, **values: Any) -> None:
        """Add a row to the result, and print it."""
        self.rows.append({"what": what, **values})
        print(f"{what:<20} {json.dumps(values, default=str)}", flush=True)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """Return the median time of `work`, with the device's part."""
        times = []
        for _ in range(self.size.num_trials + 3):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - started)
        return round(1e3 * statistics.median(times[3:]), 3)

    @functools.cached_property
    def peak_flops(self) -> float:
        """Operations a second of one large product of matrices in bf16."""
        left, right = (
            torch.randn(self.size.product, self.size.product, device=self.device, dtype=torch.bfloat16) for _ in "ab"
        )
        return 2 * self.size.product**3 / (1e-3 * self.milliseconds(lambda: left @ right))

    @functools.cached_property
    def model_dir(self) -> Path:
        """The folder of the encoder: random weights, and a tokenizer of made-up words."""
        return write_model(self.size, self.folder / "model")


def write_model(size: Size, folder: Path) -> Path:
    """Write a SentenceTransformer of BERT's architecture with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draw.choice(letters, 6)) for _ in range(size.vocabulary)]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.hidden_size,
    )
    encoder_dir = folder.with_name("encoder")
    BertModel(config, add_pooling_layer=False).save_pretrained(encoder_dir)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(encoder_dir)
    transformer = Transformer(str(encoder_dir), max_seq_length=256)
    SentenceTransformer(modules=[transformer, Pooling(size.hidden_size)], device="cpu").save_pretrained(str(folder))
    return folder


def machine(bench: Bench) -> None:
    """The versions, the card, and its rate."""
    import sentence_transformers
    import transformers

    bench.record(
        "machine",
        gpu=torch.cuda.get_device_name() if bench.is_gpu else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        transformers=transformers.__version__,
        sentence_transformers=sentence_transformers.__version__,
        python=sys.version.split()[0],
    )
    bench.record("product", bf16_tflops=round(bench.peak_flops / 1e12, 2))


def kernels(bench: Bench) -> None:
    """Each way to attend within texts: whether it is right, and its time, forward and backward."""
    from tercet.model.grouped_attention import GroupedAttention, Layout, Reach

    size, draw = bench.size, np.random.default_rng(0)
    lengths = sorted(int(n) for column in ("anchor", "positive", "negative") for n in draw_lengths(column, 64, draw))
    lengths = lengths if bench.is_gpu else lengths[:6]
    layout = Layout(lengths, bench.device)
    bounds, longest, width = layout.cu_seq_lens, layout.max_length, size.hidden_size // size.num_heads
    scale = width**-0.5
    for dtype, dropout in ((torch.bfloat16, 0.0), (torch.bfloat16, 0.1), (torch.float32, 0.0), (torch.float32, 0.1)):
        shape = (sum(lengths), size.num_heads, width)
        rows = [torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(3)]
        query, key, value = rows
        gradient = torch.randn_like(value)
        ways: dict[str, Callable[[float], torch.Tensor]] = {
            "grouped": lambda p, rows=rows: GroupedAttention.apply(*rows, None, layout, scale, p, Reach())
        }
        if bench.is_gpu and dtype != torch.float32:
            ways["flash"] = lambda p, q=query, k=key, v=value: torch.ops.aten._flash_attention_forward(
                q, k, v, bounds, bounds, longest, longest, p, False, False, scale=scale
            )[0]
        if bench.is_gpu:
            ways["efficient"] = lambda p, q=query, k=key, v=value: torch.ops.aten._efficient_attention_forward(
                q[None], k[None], v[None], None, bounds, bounds, longest, longest, p, 0, True, scale=scale
            )[0][0]
        expected = [x.detach().float() for x in _both(ways["grouped"], 0.0, rows, gradient)]
        without = expected[0]
        for name, way in ways.items():
            try:
                both = functools.partial(_both, way, dropout, rows, gradient)
                values: dict[str, Any] = {"ms": bench.milliseconds(both)}
                if dropout:
                    mean = torch.stack([way(dropout).detach().float() for _ in range(64 if bench.is_gpu else 2)]).mean(
                        0
                    )
                    values["mean_of_draws_off"] = float((mean - without).norm() / without.norm())
                else:
                    once, again = (_both(way, 0.0, rows, gradient) for _ in range(2))
                    off = [float((a.float() - b).norm() / b.norm()) for a, b in zip(once, expected, strict=True)]
                    values |= {"off": max(off), "same_bits": all(map(torch.equal, once, again))}
                bench.record("attention", way=name, dtype=str(dtype), dropout=dropout, **values)
            except (RuntimeError, ValueError) as error:
                bench.record("attention", way=name, dtype=str(dtype), dropout=dropout, failed=str(error)[:200])


def _both(
    way: Callable[[float], torch.Tensor], dropout: float, rows: list[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor]:
    output = way(dropout)
    return [output.detach(), *torch.autograd.grad(output, rows, gradient)]


def make_trainer(bench: Bench, way: str, precision: str, batch_size: int, num_steps: int, callback: Any) -> Any:
    """Return a trainer that is ready for `num_steps` steps."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import PrinterCallback

    from tercet.config.losses import MultipleNegativesRankingLossConfig
    from tercet.config.sections import ModelConfig
    from tercet.data.order import DatasetRows, RankBatches
    from tercet.model.encoder import load_model
    from tercet.model.loss import make_loss
    from tercet.model.packed_model import prepare
    from tercet.training.trainer import TercetTrainer

    config = ModelConfig(name_or_path=str(bench.model_dir), max_seq_length=256)
    model = load_model(config, str(bench.device))
    if way == FLASH:
        chosen = {"attn_implementation": "flash_attention_2", "dtype": "float32"}
        model = SentenceTransformer(str(bench.model_dir), device=str(bench.device), model_kwargs=chosen)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(bench.folder / way),
        per_device_train_batch_size=batch_size,
        max_steps=num_steps,
        learning_rate=1e-5,
        bf16=precision == "bf16",
        tf32=True if precision == "tf32" else None,
        use_cpu=not bench.is_gpu,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=bench.is_gpu,
    )
    rows = make_rows(batch_size * num_steps, model.tokenizer)
    loss = make_loss(MultipleNegativesRankingLossConfig(name="MultipleNegativesRankingLoss"), model)
    shared: dict[str, Any] = {"model": model, "args": args, "train_dataset": rows, "loss": loss}
    if way != "tercet":
        trainer: Any = SentenceTransformerTrainer(**shared)
    else:
        forward = prepare(model, "packed")
        batches = RankBatches([DatasetRows(len(rows), num_steps, None)], batch_size, 1, 0, 1, 0)
        trainer = TercetTrainer(batches, "ddp", None, False, False, forward, **shared)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    return trainer


def steps(bench: Bench) -> None:
    """Steps of tercet beside those of the plain trainer, with 16, 64 and 256 triplets."""
    for precision in ("bf16", "tf32") if bench.is_gpu else ("bf16",):
        for batch_size in bench.size.batch_sizes:
            _one_size(bench, precision, batch_size)


def _one_size(bench: Bench, precision: str, batch_size: int) -> None:
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback

    size = bench.size
    num_steps = size.num_steps * (size.num_rounds + 1)  # the first round warms up
    AcceleratorState._reset_state(True)  # it would keep the precision of the trainer before
    turns, memory, failed = Turns(len(bench.ways)), dict.fromkeys(bench.ways, 0.0), {}

    class TakeTurns(TrainerCallback):
        def __init__(self, me: int) -> None:
            self.me, self.num_rounds = me, 0

        def begin(self) -> None:
            turns.begin(self.me)
            if bench.is_gpu:
                torch.cuda.reset_peak_memory_stats()
                self.resting = torch.cuda.memory_allocated()

        def end(self) -> None:
            bench.wait()
            if bench.is_gpu:
                memory[bench.ways[self.me]] = (torch.cuda.max_memory_allocated() - self.resting) / 2**30
            self.num_rounds += 1
            turns.end(self.me)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.global_step % size.num_steps == 0:
                self.end()
                if state.global_step < num_steps:
                    self.begin()

    callbacks = [TakeTurns(me) for me in range(len(bench.ways))]
    trainers = [
        make_trainer(bench, way, precision, batch_size, num_steps, callback)
        for way, callback in zip(bench.ways, callbacks, strict=True)
    ]

    def train(me: int) -> None:
        callbacks[me].begin()
        try:
            trainers[me].train()
        except Exception as error:  # noqa: BLE001 - the other way goes on
            failed[bench.ways[me]] = f"{type(error).__name__}: {error}"[:300]
            traceback.print_exc()
            while callbacks[me].num_rounds <= size.num_rounds:
                callbacks[me].end()
                if callbacks[me].num_rounds <= size.num_rounds:
                    callbacks[me].begin()

    threads = [threading.Thread(target=train, args=(me,)) for me in range(len(bench.ways))]
    for thread in threads:
        thread.start()
    turns.ready[0].release()
    for thread in threads:
        thread.join()
    encoder = trainers[0].model[0].model
    num_weights = sum(p.numel() for name, p in encoder.named_parameters() if "embeddings" not in name)
    draw = np.random.default_rng(0)
    per_row = sum(draw_lengths(column, 10_000, draw).mean() for column in ("anchor", "positive", "negative"))
    rounds = {way: [wall for wall, _ in turns.seconds[me]][1:] for me, way in enumerate(bench.ways)}
    for way in bench.ways:
        if way in failed:
            bench.record("step", way=way, precision=precision, rows=batch_size, failed=failed[way])
            continue
        seconds = statistics.median(rounds[way]) / size.num_steps
        bench.record(
            "step",
            way=way,
            precision=precision,
            rows=batch_size,
            ms=round(1e3 * seconds, 2),
            triplets_per_s=round(batch_size / seconds),
            tokens_per_s=round(per_row * batch_size / seconds),
            share_of_peak=round(6 * num_weights * per_row * batch_size / seconds / bench.peak_flops, 4),
            activations_gib=round(memory[way], 2),
        )
    if not failed:
        ratios = [plain / own for plain, own in zip(rounds["plain"], rounds["tercet"], strict=True)]
        bench.record(
            "ratio", precision=precision, rows=batch_size, plain_over_tercet=round(statistics.median(ratios), 2)
        )


def one_step(bench: Bench) -> Callable[[], None]:
    """Return one packed step as tercet runs it, without optimizer, on a batch that was made ahead."""
    from sentence_transformers import SentenceTransformer

    from tercet.config.losses import MultipleNegativesRankingLossConfig
    from tercet.model.loss import loss_of, make_loss
    from tercet.model.packed_model import prepare

    model = SentenceTransformer(str(bench.model_dir), device=str(bench.device))
    forward = prepare(model, "packed")
    model.train()
    loss = make_loss(MultipleNegativesRankingLossConfig(name="MultipleNegativesRankingLoss"), model)
    rows = make_rows(64 if bench.is_gpu else 4, model.tokenizer)
    columns = [model.preprocess(rows[name][:]) for name in ("anchor", "positive", "negative")]
    batch = forward.batch(columns)
    if bench.is_gpu:
        batch = batch.pin_memory()

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            value = loss_of(loss, columns, batch.to(bench.device).embed(model), None)
        value.backward()
        model.zero_grad()

    return step


def waits(bench: Bench) -> None:
    """How often a step waits for the device, and where; the kernels it launches, and how long the device is busy."""
    step = one_step(bench)
    step()
    bench.wait()
    if not bench.is_gpu:
        bench.record("waits", total=None)
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen)
    bench.record("waits", total=len(seen), places=places.most_common(15))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        bench.wait()
    events = profile.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    busy = sum(event.self_device_time_total for event in events) / 1e3
    bench.record("launches", total=launches, busy_ms=round(busy, 2), step_ms=bench.milliseconds(step))


def tests(bench: Bench) -> None:
    """The tests of kernels and of whole runs on this device, in this order, as far as time allows."""
    failed = False
    for name in ("test_kernels.py", "test_cuda.py"):
        seconds = max(bench.ends_at - time.monotonic(), 30.0)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/{name}"]
        if not bench.is_gpu:
            command.append("--collect-only")
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False)
            output, code = done.stdout, str(done.returncode)
        except subprocess.TimeoutExpired as error:
            output, code = (error.stdout or b"").decode(errors="replace"), "no time left"
        print(output[-3000:], flush=True)
        bench.record("tests", file=name, exit_code=code, last=output.strip().splitlines()[-1:])
        failed = failed or code not in ("0", "no time left")
    if failed:
        raise RuntimeError("tests/gpu failed")


def embedding(bench: Bench) -> None:
    """Tokens a second of `encode`, packed and padded, as evaluation uses it."""
    from sentence_transformers import SentenceTransformer

    from tercet.model.packed_model import prepare

    model = SentenceTransformer(str(bench.model_dir), device=str(bench.device))
    texts = make_rows(bench.size.num_texts, model.tokenizer)["positive"][:]
    num_tokens = sum(len(text.split()) + 2 for text in texts)
    for way in ("padded", "packed"):
        if way == "packed":
            prepare(model, "packed")
        for dtype in (torch.float32, torch.bfloat16):
            for batch_size in (64, 512):
                with torch.autocast(bench.device.type, dtype, enabled=dtype == torch.bfloat16):
                    model.encode(texts[:batch_size], batch_size=batch_size)
                    bench.wait()
                    started = time.perf_counter()
                    model.encode(texts, batch_size=batch_size)
                    seconds = time.perf_counter() - started
                values = {"way": way, "dtype": str(dtype), "texts": batch_size}
                bench.record("embedding", **values, tokens_per_s=round(num_tokens / seconds))


def graphs(bench: Bench) -> None:
    """What fixed token budgets would give: the encoder with weights in bf16, eager, as one CUDA graph, compiled."""
    if not bench.is_gpu:
        bench.record("graphs", skipped="needs a GPU")
        return
    from transformers import AutoModel

    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import PACKED_ATTENTION

    model = AutoModel.from_pretrained(bench.folder / "encoder").to(bench.device, torch.bfloat16).eval()
    model.set_attn_implementation(PACKED_ATTENTION)
    num_weights = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    for batch_size in bench.size.batch_sizes:
        draw = np.random.default_rng(0)
        lengths = [int(n) for c in ("anchor", "positive", "negative") for n in draw_lengths(c, batch_size, draw)]
        spare = -sum(lengths) % 1024  # up to a fixed budget, by texts of padding
        lengths = sorted([*lengths, *[64] * (spare // 64), *([spare % 64] if spare % 64 else [])])
        num_tokens, layout = sum(lengths), Layout(lengths, bench.device)
        _ = layout.cu_seq_lens  # made before a graph is captured
        ids = torch.randint(0, 30_000, (1, num_tokens), device=bench.device)
        places = torch.cat([torch.arange(length) for length in lengths])[None].to(bench.device)

        def step(encoder: Any = model, ids: Any = ids, places: Any = places, layout: Any = layout) -> None:
            output = encoder(input_ids=ids, position_ids=places, layout=layout).last_hidden_state
            output.float().square().mean().backward()

        def record(way: str, ms: float, n: int = num_tokens, rows: int = batch_size) -> None:
            share = round(6 * num_weights * n / (1e-3 * ms) / bench.peak_flops, 3)
            bench.record("graphs", way=way, rows=rows, tokens=n, ms=ms, share_of_peak=share)

        record("eager", bench.milliseconds(step))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                step()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        record("graph", bench.milliseconds(graph.replay))
        del graph
        model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, dynamic=False)
    record("compiled", bench.milliseconds(lambda: step(compiled)))


def out_of_memory(bench: Bench) -> None:
    """What tercet makes of an allocation that cannot succeed."""
    from tercet.artifacts.journal import kind_of

    if not bench.is_gpu:
        bench.record("out_of_memory", skipped="needs a GPU")
        return
    try:
        torch.empty(2**42, device=bench.device)
    except Exception as error:  # noqa: BLE001 - that is the question
        bench.record("out_of_memory", torch=type(error).__name__, tercet=kind_of(error))


SECTIONS = (machine, kernels, steps, waits, embedding, out_of_memory, graphs, tests)


def main() -> int:
    """Run the sections; return the exit code."""
    names = [section.__name__ for section in SECTIONS]
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--skip", nargs="+", choices=names, default=())
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    started, failed = time.monotonic(), []
    import_quietly()
    with tempfile.TemporaryDirectory(prefix="tercet-gpu-") as folder:
        bench = Bench(arguments.device, Path(folder), started + arguments.seconds)
        for section in SECTIONS:
            name, began = section.__name__, time.monotonic()
            if name not in arguments.only or name in arguments.skip:
                continue
            if began - started > arguments.seconds:
                bench.record(f"{name}: skipped", reason="no time is left")
                continue
            try:
                section(bench)
            except Exception as error:  # noqa: BLE001 - the other sections go on
                traceback.print_exc()
                failed.append(name)
                bench.record(f"{name}: failed", error=f"{type(error).__name__}: {error}"[:400])
            bench.record(f"{name}: seconds", seconds=round(time.monotonic() - began, 1))
            arguments.out.write_text(json.dumps(bench.rows, indent=1, default=str))
    print(f"{'failed: ' + ', '.join(failed) if failed else 'no section failed'}; {arguments.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
