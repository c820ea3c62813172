"""Rows without a text twice in a batch: the order is that of the plain search, however it is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from tercet.data import no_duplicates
from tercet.data.no_duplicates import NUM_FIRST_TRIED, Texts, without_duplicates
from tercet.errors import TrainingError


class SearchingBlock:
    """The same trades, found by a search in the rows for each: slow, and simple enough to be read as the definition."""

    def __init__(self, texts: Texts, num_batches: int, batch_size: int) -> None:
        self.order = np.arange(len(texts))
        self._texts, self._num_batches, self._batch_size = texts.copy(), num_batches, batch_size

    def separate(self, batch: int) -> int:
        """Move rows out of a batch until it has no text twice. Return how many could not be moved."""
        texts = self._texts_of(batch)
        numbers = np.argsort(texts, axis=None, kind="stable")
        is_equal = texts.ravel()[numbers[1:]] == texts.ravel()[numbers[:-1]]
        # The later of two rows that share a text, or a single row that has one text in two columns.
        rows = np.unique(numbers[1:][is_equal] // texts.shape[1])
        places = (rows + batch * self._batch_size).tolist()
        return sum(len(self._clashes(place, batch)) > 1 and not self._swap(place, batch) for place in places)

    def _swap(self, place: int, batch: int) -> bool:
        """Trade the row with one of another batch, or else with a skipped one. Return whether that was possible."""
        for other in self._others(place, batch):
            clashes = self._clashes(place, other)
            if len(clashes) < 2 and self._swap_with(clashes or self._places(other), place, batch):
                return True
        return self._swap_with(range(self._num_batches * self._batch_size, len(self.order)), place, batch)

    def _others(self, place: int, batch: int) -> Iterator[int]:
        """Yield the batches after this one, then those before it.

        Beyond the first few, yields only batches in which no row shares a text with the row at `place`, or a single one
        that fits into this batch."""
        others = itertools.chain(range(batch + 1, self._num_batches), range(batch))
        yield from itertools.islice(others, NUM_FIRST_TRIED)
        if self._num_batches <= NUM_FIRST_TRIED + 1:
            return
        texts = self._texts[: self._num_batches * self._batch_size]
        in_the_way = np.flatnonzero(np.isin(texts, self._texts[place]).any(axis=1))
        staying = np.delete(self._texts_of(batch), place - batch * self._batch_size, axis=0)
        # A row that does not fit into this batch counts twice.
        weights = 1 + np.isin(texts[in_the_way], staying).any(axis=1)
        obstacles = np.bincount(in_the_way // self._batch_size, weights, self._num_batches)
        yield from (other for other in others if obstacles[other] < 2)

    def _swap_with(self, candidates: Sequence[int], place: int, batch: int) -> bool:
        """Trade the row with the first candidate that fits into its batch. Return whether there was one."""
        for candidate in candidates:
            if all(clash == place for clash in self._clashes(candidate, batch)):
                for values in (self.order, self._texts):
                    values[[place, candidate]] = values[[candidate, place]]
                return True
        return False

    def _places(self, batch: int) -> range:
        return range(batch * self._batch_size, (batch + 1) * self._batch_size)

    def _texts_of(self, batch: int) -> Texts:
        return self._texts[batch * self._batch_size : (batch + 1) * self._batch_size]

    def _clashes(self, place: int, batch: int) -> list[int]:
        """Return the places in a batch whose rows share a text with the row at `place`, ascending."""
        texts = self._texts_of(batch).ravel()
        # Text by text: comparing all with all is ten times slower, because its last axes are short.
        numbers = np.concatenate([np.flatnonzero(texts == text) for text in self._texts[place]])
        return sorted({number // self._texts.shape[1] + batch * self._batch_size for number in numbers.tolist()})


def order_or_error(texts: Texts, num_batches: int, batch_size: int) -> list[int] | str:
    try:
        return without_duplicates(texts, num_batches, batch_size).tolist()
    except TrainingError as error:
        return error.message


@pytest.mark.parametrize("seed", range(40))
def test_the_order_is_that_of_a_search_in_the_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(seed)
    num_batches, batch_size = int(draw.integers(1, 140)), int(draw.integers(1, 40))
    num_rows = num_batches * batch_size + int(draw.integers(0, batch_size + 1))
    num_texts = max(2, int(num_rows * draw.choice([0.1, 0.5, 1, 3])))
    texts = draw.integers(num_texts, size=(num_rows, int(draw.integers(1, 4))))
    if seed % 3 == 0:
        texts[draw.random(num_rows) < draw.choice([0.001, 0.01, 0.1]), 0] = 0  # one text that is nearly everywhere
    order = order_or_error(texts, num_batches, batch_size)
    monkeypatch.setattr(no_duplicates, "_Block", SearchingBlock)
    assert order == order_or_error(texts, num_batches, batch_size)
