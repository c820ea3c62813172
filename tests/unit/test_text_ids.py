"""Equal numbers for equal texts, made once, and made again when the file is not what it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from tercet import text_ids as module
from tercet.text_ids import text_ids

TEXTS = {"anchor": ["a", "b", "a", "\u00e9", "d"], "positive": ["x", "a", "y", "x", "d"]}


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict(TEXTS)


def test_numbers_are_equal_where_texts_are(rows: Dataset, tmp_path: Path) -> None:
    found = text_ids(rows, tmp_path)(np.arange(5))
    assert found.shape == (5, 2)
    texts = np.array([TEXTS["anchor"], TEXTS["positive"]]).T
    assert np.array_equal(found[:, :, None, None] == found, texts[:, :, None, None] == texts)
    assert np.array_equal(text_ids(rows, tmp_path)(np.array([3, 0])), found[[3, 0]])


def test_rows_of_more_than_one_batch(rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_ids(rows, tmp_path / "one")(np.arange(5))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    assert np.array_equal(text_ids(rows, tmp_path / "several")(np.arange(5)), expected)


def test_another_choice_of_rows_has_a_file_of_its_own(rows: Dataset, tmp_path: Path) -> None:
    whole = text_ids(rows, tmp_path)(np.arange(5))
    chosen = text_ids(rows.select([1, 4]), tmp_path)(np.arange(2))
    assert np.array_equal(chosen, whole[[1, 4]])


def test_it_is_made_once(rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_ids(rows, tmp_path)(np.arange(5))
    monkeypatch.setattr(module, "_write", None)
    assert np.array_equal(text_ids(rows, tmp_path)(np.arange(5)), expected)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(rows: Dataset, tmp_path: Path, damage: str) -> None:
    """On one machine of several it would give another order of rows."""
    expected = text_ids(rows, tmp_path)(np.arange(5))
    (path,) = (tmp_path / "text_ids").glob("*.npy")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-8]), "empty": b""}[damage])
    assert np.array_equal(text_ids(rows, tmp_path)(np.arange(5)), expected)
    assert len(list((tmp_path / "text_ids").glob("*.npy"))) == 1
