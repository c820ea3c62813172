"""Choices that a trial on a machine decides: made once per run, stored, and kept when the run resumes anywhere.

Otherwise a run that resumes on another machine could end with other numbers than it began with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from tercet.errors import AlreadyExists, PlanError
from tercet.storage import Storage
from tercet.storage.documents import Document, seal, unseal

C = TypeVar("C", bound=Document)


def choose_once(
    storage: Storage,
    key: str,
    kind: type[C],
    make: Callable[[], C],
    obstacle: Callable[[C], str | None] = lambda _: None,
) -> C:
    """Return the choice that is stored at `key`. The first time, store what `make` returns; of two processes that make
    it at the same time, the first one's is kept.

    obstacle: why this machine cannot do what was chosen, or None if it can. Raises PlanError where there is one, and
    CorruptObject when the stored choice is damaged."""
    if not storage.exists(key):
        with contextlib.suppress(AlreadyExists):
            storage.put_if_absent(key, seal(make()))
    choice = unseal(kind, storage.read(key), storage.uri_of(key), hint="choose a new --run-id")
    if (why := obstacle(choice)) is not None:
        raise PlanError(
            f"this machine cannot continue the run as it began ({storage.uri_of(key)}): {why}",
            hint="resume it on a machine like the one that it began on, or choose a new --run-id",
        )
    return choice
