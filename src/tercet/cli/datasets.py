"""The verbs `shard`, `append`, `mine` and `datasets`: make dataset versions, list them, roll back."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.data.ingest import Progress
    from tercet.data.manifest import Manifest


def add_datasets(
    verbs: Any,
    common: argparse.ArgumentParser,
    recipe: argparse.ArgumentParser,
    store: argparse.ArgumentParser,
    default_storage: str,
) -> None:
    """Add the verbs.

    common: the flags of all verbs; recipe: those of verbs that take a recipe; store: those that name the storage."""
    rows = argparse.ArgumentParser(add_help=False, parents=[common])
    rows.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="path or s3:// URI of a JSONL, JSON, CSV, TSV or Parquet file, also .gz or .zst",
    )
    rows.add_argument(
        "--to", default=default_storage, metavar="URI", help="storage: local folder or s3://bucket/prefix (%(default)s)"
    )
    rows.add_argument("--endpoint-url", metavar="URL", help="address of an S3 server other than AWS")
    rows.add_argument("--name", required=True, help="name of the dataset")
    for name in ("anchor", "positive"):
        rows.add_argument(f"--{name}", default=name, metavar="COLUMN", help=f"column of the {name}s (%(default)s)")
    kind = rows.add_mutually_exclusive_group()
    kind.add_argument(
        "--negative", action="append", metavar="COLUMN", help="column of negatives (negative); repeat it for several"
    )
    kind.add_argument("--pairs", action="store_true", help="the rows have no negative")
    rows.add_argument(
        "--group",
        metavar="COLUMN",
        help="rows with an equal value here stay in one split; by default, rows with an equal anchor",
    )
    rows.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="COLUMN",
        help="column of labels by which results are reported separately; repeat it for several",
    )
    rows.add_argument(
        "--max-bad-rows",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="publish nothing if a larger share of the rows is bad (%(default)s)",
    )
    rows.add_argument(
        "--rows-per-shard", type=int, default=65536, metavar="N", help="rows of each stored file (%(default)s)"
    )

    shard = verbs.add_parser("shard", parents=[rows], help="make a dataset version from raw rows")
    shard.set_defaults(call=_shard)
    append = verbs.add_parser("append", parents=[rows], help="add new rows to a dataset, as a new version")
    append.set_defaults(call=_append)
    mine = verbs.add_parser("mine", parents=[recipe], help="make a dataset with hard negatives from a recipe's dataset")
    mine.add_argument("--into", required=True, metavar="NAME", help="name of the new dataset")
    mine.add_argument("--num-negatives", type=int, default=1, metavar="N", help="negatives per row (%(default)s)")
    mine.add_argument(
        "--relative-margin",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="exclude texts more similar than (1 - SHARE) times the positive: they may be right answers (%(default)s)",
    )
    mine.set_defaults(call=_mine)
    datasets = verbs.add_parser("datasets", help="list, show and roll back datasets").add_subparsers(
        required=True, metavar="VERB"
    )
    listing = datasets.add_parser("list", parents=[store], help="every dataset and its versions")
    listing.set_defaults(call=_datasets_list)
    show = datasets.add_parser("show", parents=[store], help="one version: rows, shards, text lengths, sources")
    show.add_argument("name", help="name of the dataset")
    show.add_argument("--version", default="latest", help="id of the version (%(default)s)")
    show.set_defaults(call=_datasets_show)
    rollback = datasets.add_parser("rollback", parents=[store], help="make an earlier version the newest again")
    rollback.add_argument("name", help="name of the dataset")
    rollback.add_argument("--to", required=True, metavar="VERSION", help="id of the earlier version")
    rollback.set_defaults(call=_datasets_rollback)


def _build_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    from tercet.data.ingest import IngestOptions
    from tercet.storage import open_storage

    names = [] if arguments.pairs else list(dict.fromkeys(arguments.negative or ["negative"]))
    negatives = {f"negative_{n}" if len(names) > 1 else "negative": name for n, name in enumerate(names, start=1)}
    return {
        "sources": arguments.sources,
        "storage": open_storage(arguments.to, arguments.endpoint_url),
        "name": arguments.name,
        "options": IngestOptions(
            columns={"anchor": arguments.anchor, "positive": arguments.positive, **negatives},
            group=arguments.group,
            slices=tuple(dict.fromkeys(arguments.slice)),
            max_bad_rows=arguments.max_bad_rows,
            rows_per_shard=arguments.rows_per_shard,
            endpoint_url=arguments.endpoint_url,
        ),
        "on_progress": _show_progress if sys.stderr.isatty() else None,
    }


def _append(arguments: argparse.Namespace) -> None:
    from tercet.data.append import append

    result = append(**_build_arguments(arguments))
    for bad_row in result.first_bad_rows:
        print(f"bad row: {bad_row}", file=sys.stderr)
    print(f"{result.manifest.dataset} {result.manifest.version}  {result.text()}")
    if result.is_new:
        print_manifest(result.manifest)


def _shard(arguments: argparse.Namespace) -> None:
    from tercet.data.build import build_version

    result = build_version(**_build_arguments(arguments))
    manifest = result.manifest
    for bad_row in result.first_bad_rows:
        print(f"bad row: {bad_row}", file=sys.stderr)
    state = "already published" if result.already_published else "published"
    print(f"{manifest.dataset} {manifest.version}  {state}")
    print_manifest(manifest)


def _mine(arguments: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from tercet.config.recipe import load_config
    from tercet.config.sections import MiningConfig
    from tercet.errors import ConfigError
    from tercet.pipeline.mining import mine

    try:
        mining = MiningConfig(num_negatives=arguments.num_negatives, relative_margin=arguments.relative_margin)
    except ValidationError as error:
        problems = "\n".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(problems, hint="see tercet mine --help") from None
    result = mine(load_config(arguments.recipe, arguments.overrides), arguments.into, mining)
    manifest = result.build.manifest
    rows = f"{result.num_rows:,} rows, {result.num_random:,} with random negatives"
    print(f"{manifest.dataset} {manifest.version}  {rows}")
    print_manifest(manifest)


def _datasets_rollback(arguments: argparse.Namespace) -> None:
    from tercet.data.versions import publish, read_head, read_manifest
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    before, manifest = read_head(storage, arguments.name), read_manifest(storage, arguments.name, arguments.to)
    publish(storage, manifest, after=before)
    print(f"{arguments.name}: {manifest.version} is the newest version again, instead of {before}")
    print("  Files appended since then count as new. Remove bad ones before the next `append` or nightly run.")


def _show_progress(progress: Progress) -> None:
    total = "" if progress.total is None else f" of {progress.total:,}"
    unit = "rows" if progress.stage == "read" else "shards"
    print(
        f"\r{progress.stage} {progress.done:,}{total} {unit}, {progress.num_bad_rows:,} bad ", end="", file=sys.stderr
    )


def print_manifest(manifest: Manifest) -> None:
    """Print a human-readable summary of a version."""
    from tercet.data.manifest import SPLITS
    from tercet.planning.estimates import size_text

    for split in SPLITS:
        shards = manifest.splits.get(split, ())
        num_bytes = sum(shard.num_bytes for shard in shards)
        print(f"  {split:<6} {manifest.num_rows[split]:>10,} rows  {len(shards):>4} shards  {size_text(num_bytes):>10}")
    for column, statistics in manifest.text_statistics.items():
        print(f"  {column:<10} {statistics.mean_chars:8.1f} characters on average, {statistics.max_chars:,} at most")
    bad = ", ".join(f"{count:,} {kind}" for kind, count in manifest.bad_rows.items())
    print(f"  bad rows   {bad or 'none'}{' (see quarantine.jsonl of the version)' if bad else ''}")
    if manifest.num_repeated_rows:
        print(f"  not added  {manifest.num_repeated_rows:,} rows that the dataset already had")
    if manifest.num_near_copies:
        what = "near-duplicates between train and eval or test (quarantine.jsonl)"
        print(f"  excluded   {manifest.num_near_copies:,} {what}")
    if manifest.num_duplicate_rows:
        print(f"  warning: {manifest.num_duplicate_rows:,} rows repeat an earlier row")
    if manifest.num_leaked_rows:
        print(f"  excluded   {manifest.num_leaked_rows:,} rows that a later split also has (quarantine.jsonl)")
    for split in SPLITS:
        if not manifest.num_rows[split]:
            print(f"  warning: the {split} split has no rows")


def _datasets_list(arguments: argparse.Namespace) -> None:
    from tercet.data.versions import list_datasets, list_versions, read_manifest
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    names = list_datasets(storage)
    for name in names:
        head = read_manifest(storage, name)
        for version in list_versions(storage, name):
            manifest = read_manifest(storage, name, version)
            mark = "latest" if version == head.version else ""
            num_rows, created = sum(manifest.num_rows.values()), f"{manifest.created_at:%Y-%m-%d %H:%M}"
            print(f"{name}  {version}  {num_rows:>10,} rows  {created}  {mark}".rstrip())
    if not names:
        print(f"no dataset in {storage.uri}; make one with `tercet shard`")


def _datasets_show(arguments: argparse.Namespace) -> None:
    from tercet.data.versions import read_manifest
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    manifest = read_manifest(storage, arguments.name, arguments.version)
    print(f"{manifest.dataset} {manifest.version}  created {manifest.created_at:%Y-%m-%d %H:%M} UTC")
    print_manifest(manifest)
    for source in manifest.sources:
        print(f"  source     {source.name}  {source.num_rows:,} rows  sha256 {source.sha256[:16]}…")
