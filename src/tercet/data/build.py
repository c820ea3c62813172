"""Raw rows → a checked, split, sharded dataset version.

One pass: each row is read, checked, given a split by a hash, and written to that split's open Parquet file in a
temporary folder. Where a pair turns out to be in two splits, all is read once more without it in the earlier one of
train, eval and test. Storage is touched only when all rows were read and few enough were bad; then shards, quarantine,
manifest and HEAD go up in that order, so that a version is visible whole or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tercet.data.ingest import TRIPLET, Ingest, Progress, check_sources, wanted_columns
from tercet.data.manifest import (
    SPLIT_SALT,
    SPLITS,
    Manifest,
    SplitRule,
    content_id,
)
from tercet.data.row_checks import MAX_TEXT_CHARS, RepeatCounter, row_hash
from tercet.data.shard_writer import SplitWriters, upload
from tercet.data.versions import publish, read_head, read_manifest
from tercet.errors import ConfigError
from tercet.storage import Storage, layout


@dataclass(frozen=True)
class BuildResult:
    """A finished build."""

    manifest: Manifest
    """As storage holds it: of an earlier build where `already_published`."""
    already_published: bool
    """These very rows were a version before; it is HEAD again, and nothing was uploaded."""
    bad_rows: dict[str, int]
    """Of this build, by kind."""
    first_bad_rows: tuple[str, ...]
    """At most five, `file:line: kind: detail`."""


def build_version(
    sources: Sequence[str | Path],
    storage: Storage,
    name: str,
    columns: Mapping[str, str] = TRIPLET,
    group: str | None = None,
    slices: Sequence[str] = (),
    max_bad_rows: float = 0.01,
    rows_per_shard: int = 65_536,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    max_text_chars: int = MAX_TEXT_CHARS,
    on_progress: Callable[[Progress], None] | None = None,
    endpoint_url: str | None = None,
) -> BuildResult:
    """Build and publish a version of dataset `name` from files or `s3://` URIs, and make it the newest.

    `columns` maps anchor, positive and any of negative, negative_1, negative_2, ... to the files' column names;
    without a negative the rows are pairs. `group` names the files' column whose rows must stay in one split; without
    it the anchor decides. `slices` are columns of labels, such as a language, by which results are looked at.
    `max_bad_rows` is a share of all rows, 0 to 1. `fractions` are train's, eval's and test's.

    Raises TooManyBadRows above that share, DataError where no good row is left or a file cannot be read, ConfigError
    for arguments that cannot work. Then nothing was written to storage. Needs temporary disk space for the shards,
    and 16 bytes of memory a row.
    """
    wanted = wanted_columns(columns, group, slices)
    check_sources(sources, max_bad_rows)
    _check_arguments(rows_per_shard, fractions, max_text_chars)
    layout.dataset_prefix(name)  # refuse an impossible name before any row is read
    rule = SplitRule(by="group" if group else "anchor", salt=SPLIT_SALT, fractions=fractions)
    with tempfile.TemporaryDirectory(prefix="tercet-build-") as temporary, ExitStack() as stack:
        leaked: dict[str, set[int]] = {}
        while True:
            folder = Path(tempfile.mkdtemp(dir=temporary))
            quarantine = stack.enter_context((folder / "quarantine.jsonl").open("w", encoding="utf-8"))
            intake = Ingest(wanted, quarantine, max_text_chars)
            writers = SplitWriters(folder, tuple(wanted), rule, rows_per_shard, stack)
            repeats, num_leaked_rows = RepeatCounter(SPLITS), 0
            for source in sources:
                for row in intake.read(source, endpoint_url, on_progress):
                    split, texts = writers.split_of(row), row.values[: writers.num_texts]
                    if leaked and row_hash(texts[:2]) in leaked.get(split, ()):
                        num_leaked_rows += 1
                        detail = f"its anchor and positive are in {split} and in a later split"
                        intake.set_aside(row.source, row.line, "leaked", detail, " | ".join(row.values))
                        continue
                    writers.add(row)
                    repeats.add(split, texts)
            intake.check_bad_row_share(max_bad_rows)
            if leaked or not any((leaked := repeats.leaked_pairs()).values()):
                break
        quarantine.close()
        splits = writers.finish()
        version = content_id(tuple(wanted), rule, splits)
        already_published = storage.exists(layout.manifest_key(name, version))
        if already_published:
            manifest = read_manifest(storage, name, version)
        else:
            manifest = Manifest(
                dataset=name,
                version=version,
                columns=tuple(wanted),
                splits=splits,
                split_rule=rule,
                num_rows={split: sum(shard.num_rows for shard in splits[split]) for split in SPLITS},
                bad_rows=dict(intake.bad_rows),
                num_duplicate_rows=repeats.num_duplicate_rows(),
                num_leaked_rows=num_leaked_rows,
                text_statistics=intake.text_statistics(),
                sources=intake.sources,
                created_at=datetime.now(UTC).replace(microsecond=0),
                parent=read_head(storage, name),
            )
            upload(storage, manifest, writers.paths, folder, on_progress)
        published = publish(storage, manifest)
        already_published = already_published or published is not manifest  # someone else may have been faster
        return BuildResult(published, already_published, dict(intake.bad_rows), intake.first_bad_rows)


def _check_arguments(rows_per_shard: int, fractions: tuple[float, float, float], max_text_chars: int) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or not fractions[0]:
        raise ConfigError(f"fractions are {fractions}", "Train's (above 0), eval's and test's, summing to 1.")
    if rows_per_shard < 1 or max_text_chars < 1:
        what = "rows_per_shard" if rows_per_shard < 1 else "max_text_chars"
        raise ConfigError(f"{what} is {min(rows_per_shard, max_text_chars)}", "It must be at least 1.")
