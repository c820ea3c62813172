"""Pure: which texts the rows of a block have → an order in which no batch has a text twice."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tercet.errors import TrainingError

Texts = npt.NDArray[np.int64]
"""Equal numbers for equal texts: shape (num_rows, num_columns)."""

# Of the rows of a block, those that may repeat a text of their batch where no order keeps them apart. A text in
# somewhat more rows than there are batches is no reason to end a night; one that is everywhere is.
MAX_REPEATS = 0.01
# Batches that are tried before all are looked at together, which takes as long as 50 of them.
NUM_FIRST_TRIED = 64

logger = logging.getLogger("tercet")


def without_duplicates(texts: Texts, num_batches: int, batch_size: int) -> npt.NDArray[np.int64]:
    """An order of a block in which no text is in two rows of one batch. What is behind the last batch is left out.

    Where texts are too frequent for that, a few rows repeat one, which is logged. Raises TrainingError where these
    would be more than MAX_REPEATS of all."""
    in_order = np.sort(texts[: num_batches * batch_size].reshape(num_batches, -1), axis=1)
    with_equal_texts = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    block = _Block(texts, num_batches, batch_size)
    num_repeats = 0
    for batch in with_equal_texts.tolist():
        num_repeats += block.mend(batch)
        if num_repeats > MAX_REPEATS * len(texts):
            raise TrainingError(
                f"found no order of {len(texts)} rows in {num_batches} batches of {batch_size} without a text twice in "
                f"one: more than {MAX_REPEATS:.0%} of the rows repeat a text of their batch",
                hint="lower training.global_batch_size, remove repeated texts, or set training.no_duplicates=false",
            )
    if num_repeats:
        logger.warning(
            "%d of %d rows repeat a text of their batch: texts are in more rows than there are batches of %d for them",
            *(num_repeats, len(texts), batch_size),
        )
    return block.order


class _Block:
    """Rows that change places until no batch has a text twice. No swap makes a new repetition."""

    def __init__(self, texts: Texts, num_batches: int, batch_size: int) -> None:
        self.order = np.arange(len(texts))
        self._texts, self._num_batches, self._batch_size = texts.copy(), num_batches, batch_size

    def mend(self, batch: int) -> int:
        """Move rows out of a batch until it has no text twice. Returns how many could not be moved."""
        texts = self._texts_of(batch)
        numbers = np.argsort(texts, axis=None, kind="stable")
        equal = texts.ravel()[numbers[1:]] == texts.ravel()[numbers[:-1]]
        rows = np.unique(numbers[1:][equal] // texts.shape[1])  # the later one of two; or a row with one text twice
        places = (rows + batch * self._batch_size).tolist()
        return sum(len(self._clashes(place, batch)) > 1 and not self._swap(place, batch) for place in places)

    def _swap(self, place: int, batch: int) -> bool:
        """With a row of another batch, else with one that is left out."""
        for other in self._others(place, batch):
            clashes = self._clashes(place, other)
            if len(clashes) < 2 and self._swap_with(clashes or self._places(other), place, batch):
                return True
        return self._swap_with(range(self._num_batches * self._batch_size, len(self.order)), place, batch)

    def _others(self, place: int, batch: int) -> Iterator[int]:
        """The batches behind this one, then those before it; after the first few, only such as have room for the row,
        or one row in its way that this batch has room for."""
        others = itertools.chain(range(batch + 1, self._num_batches), range(batch))
        yield from itertools.islice(others, NUM_FIRST_TRIED)
        if self._num_batches <= NUM_FIRST_TRIED + 1:
            return
        texts = self._texts[: self._num_batches * self._batch_size]
        in_the_way = np.flatnonzero(np.isin(texts, self._texts[place]).any(axis=1))
        staying = np.delete(self._texts_of(batch), place - batch * self._batch_size, axis=0)
        # One that cannot come here either counts twice.
        weights = 1 + np.isin(texts[in_the_way], staying).any(axis=1)
        obstacles = np.bincount(in_the_way // self._batch_size, weights, self._num_batches)
        yield from (other for other in others if obstacles[other] < 2)

    def _swap_with(self, candidates: Sequence[int], place: int, batch: int) -> bool:
        for there in candidates:
            if all(clash == place for clash in self._clashes(there, batch)):
                for values in (self.order, self._texts):
                    values[[place, there]] = values[[there, place]]
                return True
        return False

    def _places(self, batch: int) -> range:
        return range(batch * self._batch_size, (batch + 1) * self._batch_size)

    def _texts_of(self, batch: int) -> Texts:
        return self._texts[batch * self._batch_size : (batch + 1) * self._batch_size]

    def _clashes(self, place: int, batch: int) -> list[int]:
        """Where in a batch one of the texts of the row at `place` is."""
        texts = self._texts_of(batch).ravel()
        # Text by text: a comparison of all with all is ten times slower, for its short last axes.
        found = np.concatenate([np.flatnonzero(texts == text) for text in self._texts[place]])
        return sorted({number // self._texts.shape[1] + batch * self._batch_size for number in found.tolist()})
