"""Which split a row is in: a pure function of its group or anchor, so that rows stay where they are as data grows."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict

from tercet.checks import normalise

SPLITS = ("train", "eval", "test")
SPLIT_SALT = "tercet-split-1"
"""Never changes: with another salt, rows would move between train, eval and test."""


class SplitRule(BaseModel):
    """How a row's split is decided: blake2b(salt + the value of column `by`) against the cumulated fractions."""

    model_config = ConfigDict(frozen=True)

    by: str
    """`anchor` or `group`."""
    salt: str
    fractions: tuple[float, float, float]
    """Of train, eval, test; they sum to 1."""

    def split_of(self, key: str) -> str:
        """train, eval or test for a row whose group (or anchor) is `key`.

        Depends on nothing else: other rows may come and go. Case, whitespace and Unicode form do not count, so that
        near copies stay together.
        """
        text = f"{self.salt}\n{normalise(normalise(key).casefold())}"
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        train, evaluation, test = self.fractions
        if position < train:
            return "train"
        # The fractions' sum may be a hair below 1: what lies above it goes to the last split that has a share.
        if position < train + evaluation or not test:
            return "eval" if evaluation else "train"
        return "test"
