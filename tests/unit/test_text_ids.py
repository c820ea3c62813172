"""Equal numbers for equal texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.table import MemoryMappedTable, concat_tables

from tercet.text_ids import text_ids

TEXTS = {"anchor": ["a", "b", "a", "\u00e9", "d"], "positive": ["x", "a", "y", "x", "d"]}


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(TEXTS)


def test_numbers_are_equal_where_texts_are(rows: Dataset) -> None:
    found = text_ids(rows)(np.arange(5))
    assert found.shape == (5, 2)
    texts = np.array([TEXTS["anchor"], TEXTS["positive"]]).T
    assert np.array_equal(found[:, :, None, None] == found, texts[:, :, None, None] == texts)
    assert np.array_equal(text_ids(rows)(np.array([3, 0])), found[[3, 0]])


def test_rows_of_several_files_and_batches(rows: Dataset, tmp_path: Path) -> None:
    """As they are mapped from shards: chunks that begin amid a batch, and one without a row."""
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


def test_a_choice_of_rows(rows: Dataset) -> None:
    chosen = text_ids(rows.select([1, 4]))(np.arange(2))
    assert np.array_equal(chosen, text_ids(rows)(np.array([1, 4])))


def test_numbers_are_the_same_on_every_machine() -> None:
    """They decide the order of rows: xxh3 of a text as UTF-8."""
    assert text_ids(Dataset.from_dict({"anchor": ["\u00e9"]}))(np.arange(1)).tolist() == [[-606849052844159821]]
