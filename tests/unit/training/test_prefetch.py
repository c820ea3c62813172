"""One batch is made ahead, in order; an error is raised in place of its batch."""

from __future__ import annotations

import threading

import pytest

from tercet.training.prefetch import Prefetcher


def test_each_item_comes_once_and_in_order() -> None:
    ahead: Prefetcher[int] = Prefetcher()
    for length in (5, 3):
        source = iter(range(length))
        assert [ahead.get(source, lambda source=source: next(source, -1)) for _ in range(length + 2)] == [
            *range(length),
            -1,
            -1,
        ]


def test_the_next_item_is_made_while_the_first_is_used() -> None:
    ahead: Prefetcher[str] = Prefetcher()
    made: list[str] = []
    second = threading.Event()

    def make() -> str:
        made.append(threading.current_thread().name)
        if len(made) == 2:
            second.set()
        return made[-1]

    assert ahead.get("source", make).startswith("tercet-look-ahead")
    assert second.wait(10)
    ahead.drain()
    assert len(made) == 2


def test_drain_waits() -> None:
    ahead: Prefetcher[int] = Prefetcher()
    go, finished = threading.Event(), []

    def make() -> int:
        if finished:
            go.wait(10)
        finished.append(1)
        return len(finished)

    ahead.drain()
    assert ahead.get("source", make) == 1
    threading.Timer(0.2, go.set).start()
    ahead.drain()
    assert len(finished) == 2


def test_an_error_is_raised_in_place_of_its_item() -> None:
    ahead: Prefetcher[int] = Prefetcher()
    values = iter([1, 2])

    def make() -> int:
        for value in values:
            return value
        raise RuntimeError("no more")

    assert [ahead.get("source", make) for _ in range(2)] == [1, 2]
    with pytest.raises(RuntimeError, match="no more"):
        ahead.get("source", make)
