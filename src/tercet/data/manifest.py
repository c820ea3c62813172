"""The manifest of a dataset version: what the version holds, its id, and the split that a row belongs to.

The id depends on the content alone (`content_id`), so building the same rows twice gives the same version.
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
    """How a row's split is decided: a hash of salt and group (or anchor), compared with the cumulative fractions."""

    by: str
    """The column that decides: `anchor` or `group`."""
    salt: str
    fractions: tuple[float, float, float]
    """Shares of train, eval and test; they sum to 1."""

    def split_of(self, key: str) -> str:
        """Return train, eval or test for a row whose group (or anchor) is `key`.

        Depends on nothing else, so a row keeps its split as the dataset grows. Case, whitespace and Unicode form are
        ignored, so that nearly equal keys share a split.
        """
        text = f"{self.salt}\n{normalise(normalise(key).casefold())}"
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        train, evaluation, test = self.fractions
        if position < train:
            return "train"
        # The fractions may sum to slightly less than 1. The rest belongs to the last split that has a share.
        if position < train + evaluation or not test:
            return "eval" if evaluation else "train"
        return "test"


class Shard(Frozen):
    """One Parquet file of one split."""

    path: str
    """Path in the version, e.g. `shards/train-00000-of-00003.parquet`."""
    num_rows: int
    num_bytes: int
    sha256: str
    version: str | None = None
    """The earlier version whose folder holds the file; None if it is in the folder of this version."""


class TextStatistics(Frozen):
    """Text lengths of one column in characters, over all splits."""

    mean_chars: float
    max_chars: int


class Source(Frozen):
    """A file that rows were read from."""

    name: str
    """The path or URI as given."""
    sha256: str
    num_rows: int
    """Rows read, bad ones included."""


class Manifest(Document):
    """One immutable version of a dataset."""

    dataset: str
    version: str
    columns: tuple[str, ...]
    """Columns of the shards, in order: anchor, positive, negatives, group, slices (`slice_<name>`); all are text."""
    splits: dict[str, tuple[Shard, ...]]
    """Shards of train, eval and test; a split without rows has none."""
    split_rule: SplitRule
    num_rows: dict[str, int]
    """Good rows of each split."""
    bad_rows: dict[str, int] = Field(default_factory=dict)
    """Bad rows by kind (`row_checks.BadKind`). They are in the quarantine."""
    num_duplicate_rows: int = 0
    """Rows that equal an earlier row. They are in the shards; the count is a warning."""
    num_leaked_rows: int = 0
    """Rows that were excluded because a later split (of train, eval, test) has the same anchor and positive. They are
    in the quarantine."""
    text_statistics: dict[str, TextStatistics] = Field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    created_at: datetime
    tercet_version: str = __version__
    parent: str | None = None
    """The newest version when this one was built. If rows were appended, the version that they were appended to."""
    num_repeated_rows: int = 0
    """Rows that were not appended because the dataset already has them."""
    num_near_copies: int = 0
    """Near-duplicates that were not appended: train rows near a row of eval or test, and the reverse. They are in the
    quarantine."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are encoded: all but `group` and slices."""
        return tuple(filter(is_text, self.columns))

    @property
    def num_bad_rows(self) -> int:
        """Quarantined rows of all kinds."""
        return sum(self.bad_rows.values())

    @property
    def new_rows(self) -> dict[str, int]:
        """Rows of each split that the parent does not have."""
        return {
            split: sum(shard.num_rows for shard in shards if shard.version is None)
            for split, shards in self.splits.items()
        }

    def key_of(self, shard: Shard) -> str:
        """Return the key of one of the shards in storage."""
        return f"{version_prefix(self.dataset, shard.version or self.version)}/{shard.path}"

    @property
    def content(self) -> str:
        """The content id of what this manifest describes; must equal `version`."""
        return content_id(self.columns, self.split_rule, self.splits)


def content_id(columns: tuple[str, ...], rule: SplitRule, splits: Mapping[str, tuple[Shard, ...]]) -> str:
    """Return the id of a version: 16 hex digits of a hash over its columns, its split rule and its shards, in order.

    Independent of where the rows came from, when, and what was quarantined. Depends on the bytes of the shards, so the
    same rows written by another version of pyarrow may get another id.
    """
    shards = {split: [shard.model_dump(exclude_none=True) for shard in splits[split]] for split in sorted(splits)}
    canonical = {"columns": columns, "split_rule": rule.model_dump(), "splits": shards}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]
