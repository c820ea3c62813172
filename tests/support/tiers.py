"""Parameters of a test that only `make soak` runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_soak(cases: Iterable[Any]) -> list[Any]:
    """Mark cases of a parametrised test for `make soak` alone. A tuple holds several arguments."""
    return [pytest.param(*case if isinstance(case, tuple) else (case,), marks=pytest.mark.soak) for case in cases]
