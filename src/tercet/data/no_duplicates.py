"""Reorder the rows of a block so that no batch contains a text twice. Pure functions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tercet.errors import TrainingError

Texts = npt.NDArray[np.int64]
"""Equal numbers for equal texts: shape (num_rows, num_columns)."""

# Largest share of a block's rows that may repeat a text of their batch if no order separates them. A text in slightly
# more rows than there are batches is no reason to end a run; one that is everywhere is.
MAX_REPEATS = 0.01
# Batches that are tried one by one before all others are searched together, which takes as long as 50 of them.
NUM_FIRST_TRIED = 64

logger = logging.getLogger("tercet")


def without_duplicates(texts: Texts, num_batches: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Return an order of a block's rows (a permutation) in which no two rows of a batch share a text.

    The first num_batches * batch_size rows of the order form the batches; the rest is skipped. If a text is too
    frequent, a few rows repeat it within their batch, which is logged.

    Raises TrainingError if more than MAX_REPEATS of the rows would repeat a text."""
    in_order = np.sort(texts[: num_batches * batch_size].reshape(num_batches, -1), axis=1)
    with_equal_texts = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    block = _Block(texts, num_batches, batch_size)
    num_repeats = 0
    for batch in with_equal_texts.tolist():
        num_repeats += block.separate(batch)
        if num_repeats > MAX_REPEATS * len(texts):
            raise TrainingError(
                f"found no order of {len(texts)} rows in {num_batches} batches of {batch_size} without a text twice in "
                f"one batch: more than {MAX_REPEATS:.0%} of the rows repeat a text of their batch",
                hint="lower training.global_batch_size, remove repeated texts, or set training.no_duplicates=false",
            )
    if num_repeats:
        logger.warning(
            "%d of %d rows repeat a text of their batch: some texts are in more rows than there are batches of %d",
            *(num_repeats, len(texts), batch_size),
        )
    return block.order


class _Block:
    """Rows of a block, which trade places until no batch has a text twice. No trade creates a new repeat."""

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
