"""Build a dataset version from raw rows: checked, split and written to shards.

One pass over the sources: each row is read, checked, assigned to a split by a hash, and written to that split's open
Parquet file in a temporary folder. If a pair turns out to be in two splits, a second pass excludes it from the earlier
one (of train, eval, test). Storage is written only after all rows were read and few enough were bad. Shards,
quarantine, manifest and HEAD are then uploaded in that order, so that a version is visible whole or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tercet.data.ingest import DEFAULT_OPTIONS, Ingest, IngestOptions, OnProgress, check_sources
from tercet.data.manifest import (
    SPLIT_SALT,
    SPLITS,
    Manifest,
    SplitRule,
    content_id,
)
from tercet.data.row_checks import RepeatCounter, row_hash
from tercet.data.shard_writer import SplitWriters, upload
from tercet.data.versions import publish, read_head, read_manifest
from tercet.errors import ConfigError
from tercet.storage import Storage, layout


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    manifest: Manifest
    """The stored manifest. If `already_published`, an earlier build wrote it."""
    already_published: bool
    """Whether storage already held a version with exactly these rows. Nothing was uploaded; HEAD points to it again."""
    bad_rows: dict[str, int]
    """Bad rows of this build, by kind."""
    first_bad_rows: tuple[str, ...]
    """At most five, each as `file:line: kind: detail`."""


def build_version(
    sources: Sequence[str | Path],
    storage: Storage,
    name: str,
    options: IngestOptions = DEFAULT_OPTIONS,
    *,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    on_progress: OnProgress | None = None,
) -> BuildResult:
    """Build a version of dataset `name` from files or `s3://` URIs, publish it, and make it the newest.

    `fractions` are the shares of train, eval and test; they sum to 1. Needs temporary disk space for the shards, and 16
    bytes of memory per row.

    Raises TooManyBadRows if the share of bad rows is above `options.max_bad_rows`, DataError if no good row is left or
    a file cannot be read, ConfigError for arguments that cannot work. In these cases nothing was written to storage."""
    check_sources(sources)
    _check_fractions(fractions)
    layout.dataset_prefix(name)  # refuse an impossible name before any row is read
    columns = tuple(options.wanted_columns)
    rule = SplitRule(by="group" if options.group else "anchor", salt=SPLIT_SALT, fractions=fractions)
    with tempfile.TemporaryDirectory(prefix="tercet-build-") as temporary, ExitStack() as stack:
        shards = _Pass(Path(tempfile.mkdtemp(dir=temporary)), options, rule, stack, on_progress)
        shards.read(sources)
        leaked_pairs = shards.repeats.leaked_pairs()
        if any(leaked_pairs.values()):
            shards = _Pass(Path(tempfile.mkdtemp(dir=temporary)), options, rule, stack, on_progress)
            shards.read(sources, leaked_pairs)
        splits = shards.writers.finish()
        version = content_id(columns, rule, splits)
        already_published = storage.exists(layout.manifest_key(name, version))
        if already_published:
            manifest = read_manifest(storage, name, version)
        else:
            manifest = Manifest(
                dataset=name,
                version=version,
                columns=columns,
                splits=splits,
                split_rule=rule,
                num_rows={split: sum(shard.num_rows for shard in splits[split]) for split in SPLITS},
                bad_rows=dict(shards.ingest.bad_rows),
                num_duplicate_rows=shards.repeats.num_duplicate_rows(),
                num_leaked_rows=shards.num_leaked_rows,
                text_statistics=shards.ingest.text_statistics(),
                sources=shards.ingest.sources,
                created_at=datetime.now(UTC).replace(microsecond=0),
                parent=read_head(storage, name),
            )
            upload(storage, manifest, shards.writers.paths, shards.folder, on_progress)
        published = publish(storage, manifest)
        already_published = already_published or published is not manifest  # another build may have been faster
        return BuildResult(published, already_published, dict(shards.ingest.bad_rows), shards.ingest.first_bad_rows)


class _Pass:
    """One pass over the sources, and the shards and the quarantine that it writes to `folder`."""

    def __init__(
        self, folder: Path, options: IngestOptions, rule: SplitRule, stack: ExitStack, on_progress: OnProgress | None
    ) -> None:
        """stack: closes the files if the build fails."""
        self.folder = folder
        self._quarantine = stack.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))
        self.ingest = Ingest(options, self._quarantine, on_progress)
        self.writers = SplitWriters(folder, tuple(options.wanted_columns), rule, options.rows_per_shard, stack)
        self.repeats = RepeatCounter(SPLITS)
        self.num_leaked_rows = 0

    def read(self, sources: Sequence[str | Path], leaked_pairs: Mapping[str, set[int]] | None = None) -> None:
        """Write the good rows, except those whose pair is among the `leaked_pairs` of their split."""
        for source in sources:
            for row in self.ingest.read(source):
                split, texts = self.writers.split_of(row), row.values[: self.writers.num_texts]
                if leaked_pairs and row_hash(texts[:2]) in leaked_pairs.get(split, ()):
                    self.num_leaked_rows += 1
                    self.ingest.exclude(row, "leaked", f"its anchor and positive are in {split} and in a later split")
                else:
                    self.writers.add(row)
                    self.repeats.add(split, texts)
        self._quarantine.close()
        self.ingest.check_bad_row_share()


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or not fractions[0]:
        hint = "Give the shares of train (above 0), eval and test; they must sum to 1."
        raise ConfigError(f"fractions are {fractions}", hint)
