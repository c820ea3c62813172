"""Makes the next batch in a thread while a step runs, so that no step waits for rows or tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Makes one item ahead, in order.

    A thread is enough: tokenizers release Python's lock, and a process would hold a copy of the model. Call `drain`
    before the tokenizer is used elsewhere: two threads cannot use it at the same time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tercet-look-ahead")
        self._source: object = None
        self._next: Future[T] | None = None

    def get(self, source: object, make: Callable[[], T]) -> T:
        """Return what `make` returns, and begin to make the next item. Raises what `make` raises.

        An item made ahead is returned only if it was made for the same `source`."""
        if self._next is None or self._source is not source:
            self.drain()
            self._source, self._next = source, self._pool.submit(make)
        made = self._next.result()
        self._next = self._pool.submit(make)
        return made

    def drain(self) -> None:
        """Wait until no item is being made."""
        if self._next is not None:
            wait([self._next])
