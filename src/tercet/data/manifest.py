"""A dataset version: what it holds, how it is named, how it becomes visible.

A version is named by what is in it (`content_id`), so building the same rows twice gives the same version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime

from pydantic import Field

from tercet import __version__
from tercet.data.row_checks import is_text, normalise
from tercet.storage.documents import Document, Frozen
from tercet.storage.layout import version_prefix

SPLITS = ("train", "eval", "test")

SPLIT_SALT = "tercet-split-1"
"""Never changes: with another salt, rows would move between train, eval and test."""


class SplitRule(Frozen):
    """How a row's split is decided: blake2b(salt + the value of column `by`) against the cumulated fractions."""

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


class Shard(Frozen):
    """One Parquet file of one split."""

    path: str
    """Relative to the version, e.g. `shards/train-00000-of-00003.parquet`."""
    num_rows: int
    num_bytes: int
    sha256: str
    version: str | None = None
    """The version that it lies in, where that is an earlier one which this one adds to."""


class TextStatistics(Frozen):
    """Lengths of one column's texts in characters, over the rows of all splits."""

    mean_chars: float
    max_chars: int


class Source(Frozen):
    """A file that rows were read from."""

    name: str
    """The path or URI as it was given."""
    sha256: str
    num_rows: int
    """Rows read from it, bad ones included."""


class Manifest(Document):
    """One immutable version of a dataset."""

    dataset: str
    version: str
    columns: tuple[str, ...]
    """As in the shards: anchor, positive, negatives if any, group if any, slices if any (`slice_<name>`); all text."""
    splits: dict[str, tuple[Shard, ...]]
    """train, eval, test; a split without rows has no shards."""
    split_rule: SplitRule
    num_rows: dict[str, int]
    """Good rows of each split."""
    bad_rows: dict[str, int] = Field(default_factory=dict)
    """Quarantined rows by kind (`checks.BadKind`)."""
    num_duplicate_rows: int = 0
    """A warning: rows that equal an earlier row. They are in the shards."""
    num_leaked_rows: int = 0
    """Rows that were left out, because a later split (of train, eval, test) has their anchor and positive too. They are
    in the quarantine."""
    text_statistics: dict[str, TextStatistics] = Field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    created_at: datetime
    tercet_version: str = __version__
    parent: str | None = None
    """The version that was HEAD when this one was built; of appended rows, the one that they were added to."""
    num_repeated_rows: int = 0
    """Rows that were not added, because they were there already."""
    num_near_copies: int = 0
    """Rows that were not added, because they are near copies of rows on the other side: of train, or of eval and test.
    They are in the quarantine."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are encoded: not `group`, nor slices."""
        return tuple(filter(is_text, self.columns))

    @property
    def num_bad_rows(self) -> int:
        """Quarantined rows of all kinds."""
        return sum(self.bad_rows.values())

    @property
    def new_rows(self) -> dict[str, int]:
        """Good rows of each split that the version before does not have."""
        return {
            split: sum(shard.num_rows for shard in shards if shard.version is None)
            for split, shards in self.splits.items()
        }

    def key_of(self, shard: Shard) -> str:
        """Where one of its shards lies in storage."""
        return f"{version_prefix(self.dataset, shard.version or self.version)}/{shard.path}"

    @property
    def content(self) -> str:
        """What `version` must be for the content this manifest describes."""
        return content_id(self.columns, self.split_rule, self.splits)


def content_id(columns: tuple[str, ...], rule: SplitRule, splits: Mapping[str, tuple[Shard, ...]]) -> str:
    """The name of a version: 16 hex digits over its columns, its split rule and its shards in order.

    Where rows came from, when, and what was quarantined are not in it. The shards' bytes are, and another version
    of pyarrow may write the same rows as other bytes: then they are another version.
    """
    shards = {split: [shard.model_dump(exclude_none=True) for shard in splits[split]] for split in sorted(splits)}
    canonical = {"columns": columns, "split_rule": rule.model_dump(), "splits": shards}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]
