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
CANDIDATES_AT_ONCE = 256

logger = logging.getLogger("tercet")


def without_duplicates(texts: Texts, num_batches: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Return an order of a block's rows (a permutation) in which no two rows of a batch share a text.

    The first num_batches * batch_size rows of the order form the batches; the rest is skipped. If a text is too
    frequent, a few rows repeat it within their batch, which is logged.

    Raises TrainingError if more than MAX_REPEATS of the rows would repeat a text."""
    if num_batches == 0:
        return np.arange(len(texts))
    in_order = np.sort(texts[: num_batches * batch_size].reshape(num_batches, -1), axis=1)
    with_equal_texts = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(axis=1))
    if not len(with_equal_texts):
        return np.arange(len(texts))
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


def separate_rest(
    texts: Texts, order: npt.NDArray[np.int64], num_batches: int, batch_size: int
) -> npt.NDArray[np.int64]:
    """Return an order in which the rows after the whole batches, which form a smaller one, share no text either.

    order: as `without_duplicates` returns it. A row that repeats a text trades places with one of a whole batch, so
    that neither batch gets a new repeat; if none fits, it stays, which is logged."""
    order, num_whole = order.copy(), num_batches * batch_size
    num_repeats = 0
    for place in range(num_whole, len(order)):
        others = [*order[num_whole:place], *order[place + 1 :]]
        rest = texts[others]
        if not np.isin(texts[order[place]], rest).any():
            continue
        fits = ~np.isin(texts[order[:num_whole]], rest).any(axis=1)
        for candidate in np.flatnonzero(fits).tolist():
            start = candidate // batch_size * batch_size
            batch = [row for row in order[start : start + batch_size].tolist() if row != order[candidate]]
            if not np.isin(texts[order[place]], texts[batch]).any():
                order[[place, candidate]] = order[[candidate, place]]
                break
        else:
            num_repeats += 1
    if num_repeats:
        logger.warning("%d of the last %d rows of a pass repeat a text", num_repeats, len(order) - num_whole)
    return order


class _Block:
    """Rows of a block, which trade places until no batch has a text twice. No trade creates a new repeat.

    Texts are numbered from 0 within the block. Where a text is, is looked up in lists by text and in counts for one
    batch; to search the rows took a minute for a block of batches of 4,096 rows (docs/scale.md)."""

    def __init__(self, texts: Texts, num_batches: int, batch_size: int) -> None:
        self._num_batches, self._batch_size = num_batches, batch_size
        self.order = np.arange(len(texts))
        """The row at each place."""
        self._place_of = np.arange(len(texts))
        """The place of each row."""
        distinct, numbers = np.unique(texts, return_inverse=True)
        self._texts = numbers.reshape(texts.shape)
        """The numbers of each row's texts."""
        self._starts = np.searchsorted(np.sort(self._texts, axis=None), np.arange(len(distinct) + 1))
        self._rows_by_text = np.argsort(self._texts, axis=None, kind="stable") // texts.shape[1]
        """The rows of text t are those from `_starts[t]` to `_starts[t + 1]`."""
        self._num_in_batch = np.zeros(len(distinct), dtype=np.int64)
        """How often each text is in the batch that is being separated."""

    def separate(self, batch: int) -> int:
        """Move rows out of a batch until it has no text twice. Return how many could not be moved."""
        texts = self._texts_of(batch)
        np.add.at(self._num_in_batch, texts, 1)
        numbers = np.argsort(texts, axis=None, kind="stable")
        is_equal = texts.ravel()[numbers[1:]] == texts.ravel()[numbers[:-1]]
        # The later of two rows that share a text, or a single row that has one text in two columns.
        rows = np.unique(numbers[1:][is_equal] // texts.shape[1])
        places = (rows + batch * self._batch_size).tolist()
        num_left = sum(not self._is_alone(place) and not self._swap(place, batch) for place in places)
        self._num_in_batch[self._texts_of(batch)] = 0
        return num_left

    def _is_alone(self, place: int) -> bool:
        """Return whether no other row of the batch that is being separated shares a text with the row at `place`."""
        texts = self._texts[self.order[place]]
        return all(self._num_in_batch[text] == (texts == text).sum() for text in texts)

    def _swap(self, place: int, batch: int) -> bool:
        """Trade the row with one of another batch, or else with a skipped one. Return whether that was possible."""
        for other in self._others(place, batch):
            clashes = self._clashes(place, other)
            if len(clashes) < 2 and self._swap_with(clashes or self._places(other), place):
                return True
        return self._swap_with(range(self._num_batches * self._batch_size, len(self.order)), place)

    def _others(self, place: int, batch: int) -> Iterator[int]:
        """Yield the batches after this one, then those before it.

        Beyond the first few, yields only batches in which no row shares a text with the row at `place`, or a single one
        that fits into this batch."""
        others = itertools.chain(range(batch + 1, self._num_batches), range(batch))
        yield from itertools.islice(others, NUM_FIRST_TRIED)
        if self._num_batches <= NUM_FIRST_TRIED + 1:
            return
        own = self._texts[self.order[place]]
        rows = np.unique(np.concatenate([self._rows_of(text) for text in own]))
        places = self._place_of[rows]
        in_the_way = places[places < self._num_batches * self._batch_size]
        # A row that does not fit into this batch counts twice.
        weights = 2 - self._fit(in_the_way, place)
        obstacles = np.bincount(in_the_way // self._batch_size, weights, self._num_batches)
        yield from (other for other in others if obstacles[other] < 2)

    def _swap_with(self, candidates: Sequence[int], place: int) -> bool:
        """Trade the row with the first candidate that fits into its batch. Return whether there was one."""
        for start in range(0, len(candidates), CANDIDATES_AT_ONCE):
            places = np.asarray(candidates[start : start + CANDIDATES_AT_ONCE])
            fit = self._fit(places, place)
            if fit.any():
                self._trade(place, int(places[fit.argmax()]))
                return True
        return False

    def _fit(self, candidates: npt.NDArray[np.int64], place: int) -> npt.NDArray[np.bool_]:
        """Return which candidates have no text of the batch of `place`, apart from the row at `place` itself."""
        texts = self._texts[self.order[place]]
        np.subtract.at(self._num_in_batch, texts, 1)
        fit: npt.NDArray[np.bool_] = (self._num_in_batch[self._texts[self.order[candidates]]] == 0).all(axis=1)
        np.add.at(self._num_in_batch, texts, 1)
        return fit

    def _trade(self, place: int, other: int) -> None:
        """Let a row of the batch that is being separated trade places with one that is not in it."""
        np.subtract.at(self._num_in_batch, self._texts[self.order[place]], 1)
        np.add.at(self._num_in_batch, self._texts[self.order[other]], 1)
        self.order[[place, other]] = self.order[[other, place]]
        self._place_of[self.order[[place, other]]] = place, other

    def _places(self, batch: int) -> range:
        return range(batch * self._batch_size, (batch + 1) * self._batch_size)

    def _texts_of(self, batch: int) -> Texts:
        return self._texts[self.order[batch * self._batch_size : (batch + 1) * self._batch_size]]

    def _rows_of(self, text: int) -> npt.NDArray[np.int64]:
        rows: npt.NDArray[np.int64] = self._rows_by_text[self._starts[text] : self._starts[text + 1]]
        return rows

    def _clashes(self, place: int, other: int) -> list[int]:
        """Return the places in another batch whose rows share a text with the row at `place`, ascending."""
        clashes: set[int] = set()
        for text in self._texts[self.order[place]]:
            places = self._place_of[self._rows_of(text)]
            clashes.update(places[places // self._batch_size == other].tolist())
        return sorted(clashes)
