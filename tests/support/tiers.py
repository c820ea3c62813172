"""Which parameters of a test `make test` runs, and which are left to `make soak`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_soak(cases: Iterable[Any]) -> list[Any]:
    """The cases of a parametrised test that `make soak` alone runs. A tuple is several arguments."""
    return [pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.soak) for case in cases]
