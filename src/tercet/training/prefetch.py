"""The next batch, made in a thread while a step runs: reading rows and making tokens is off its path."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """One ahead, in order. A thread is enough: tokenizers let go of Python's lock, and a process of its own would hold
    a copy of the model. Call `drain` before the tokenizer is used elsewhere: it cannot be used twice at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tercet-look-ahead")
        self._source: object = None
        self._next: Future[T] | None = None

    def get(self, source: object, make: Callable[[], T]) -> T:
        """What `make` returns, or raises, called for the first time for this source or ahead of time."""
        if self._next is None or self._source is not source:
            self.drain()
            self._source, self._next = source, self._pool.submit(make)
        made = self._next.result()
        self._next = self._pool.submit(make)
        return made

    def drain(self) -> None:
        """Wait until nothing is being made."""
        if self._next is not None:
            wait([self._next])
