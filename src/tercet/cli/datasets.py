"""`tercet shard`, `append` and `datasets`: raw rows into versions of a dataset, and what versions there are."""

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
    """Add the verbs; `common` has the flags of all, `recipe` those of a recipe, `store` those that say where storage
    is."""
    rows = argparse.ArgumentParser(add_help=False, parents=[common])
    rows.add_argument("sources", nargs="+", metavar="SRC", help="JSONL, JSON, CSV, TSV or Parquet; also .gz and .zst")
    rows.add_argument("--to", default=default_storage, metavar="URI", help="storage (%(default)s)")
    rows.add_argument("--endpoint-url", help="of an S3 server other than AWS")
    rows.add_argument("--name", required=True, help="of the dataset")
    for name in ("anchor", "positive"):
        rows.add_argument(f"--{name}", default=name, metavar="COLUMN", help=f"column that holds the {name} ({name})")
    kind = rows.add_mutually_exclusive_group()
    kind.add_argument("--negative", action="append", metavar="COLUMN", help="column of negatives; repeat it for more")
    kind.add_argument("--pairs", action="store_true", help="there is no negative column")
    rows.add_argument(
        "--group", metavar="COLUMN", help="rows of one group stay in one split; without it, of one anchor"
    )
    rows.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="COLUMN",
        help="labels by which results are looked at",
    )
    rows.add_argument(
        "--max-bad-rows", type=float, default=0.01, metavar="SHARE", help="publish nothing above (%(default)s)"
    )
    rows.add_argument("--rows-per-shard", type=int, default=65536, metavar="N", help="(%(default)s)")

    shard = verbs.add_parser("shard", parents=[rows], help="raw rows → a dataset version")
    shard.set_defaults(call=_shard)
    append = verbs.add_parser("append", parents=[rows], help="new rows → a version that adds them to the newest")
    append.set_defaults(call=_append)
    mine = verbs.add_parser("mine", parents=[recipe], help="a recipe's dataset with hard negatives → another dataset")
    mine.add_argument("--into", required=True, metavar="NAME", help="the dataset that is made")
    mine.add_argument("--num-negatives", type=int, default=1, metavar="N", help="of each row (%(default)s)")
    mine.add_argument(
        "--relative-margin",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="what is nearer than this below the positive is taken for right, and left out (%(default)s)",
    )
    mine.set_defaults(call=_mine)
    datasets = verbs.add_parser("datasets", help="what datasets there are").add_subparsers(
        required=True, metavar="VERB"
    )
    listing = datasets.add_parser("list", parents=[store], help="every dataset and its versions")
    listing.set_defaults(call=_datasets_list)
    show = datasets.add_parser("show", parents=[store], help="one version")
    show.add_argument("name")
    show.add_argument("--version", default="latest")
    show.set_defaults(call=_datasets_show)
    rollback = datasets.add_parser("rollback", parents=[store], help="make an earlier version the newest again")
    rollback.add_argument("name")
    rollback.add_argument("--to", required=True, metavar="VERSION")
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
    state = "was published already" if result.already_published else "published"
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
        problems = "\n".join(f"{found['loc'][0]}: {found['msg']}" for found in error.errors())
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
    print(f"{arguments.name}: {manifest.version} is the newest, instead of {before}")
    print("  files that were added since are new again: take bad ones away before the next night")


def _show_progress(progress: Progress) -> None:
    total = "" if progress.total is None else f" of {progress.total:,}"
    unit = "rows" if progress.stage == "read" else "shards"
    print(
        f"\r{progress.stage} {progress.done:,}{total} {unit}, {progress.num_bad_rows:,} bad ", end="", file=sys.stderr
    )


def print_manifest(manifest: Manifest) -> None:
    """A version, as a person reads it."""
    from tercet.data.manifest import SPLITS
    from tercet.planning.estimates import size_text

    for split in SPLITS:
        shards = manifest.splits.get(split, ())
        num_bytes = sum(shard.num_bytes for shard in shards)
        print(f"  {split:<6} {manifest.num_rows[split]:>10,} rows  {len(shards):>4} shards  {size_text(num_bytes):>10}")
    for column, statistics in manifest.text_statistics.items():
        print(f"  {column:<10} {statistics.mean_chars:8.1f} characters on average, {statistics.max_chars:,} at most")
    bad = ", ".join(f"{count:,} {kind}" for kind, count in manifest.bad_rows.items())
    print(f"  bad rows   {bad or 'none'}{' (in quarantine.jsonl beside the version)' if bad else ''}")
    if manifest.num_repeated_rows:
        print(f"  not added  {manifest.num_repeated_rows:,} rows that were there already")
    if manifest.num_near_copies:
        print(f"  left out   {manifest.num_near_copies:,} near copies across train and eval or test (quarantine.jsonl)")
    if manifest.num_duplicate_rows:
        print(f"  warning: {manifest.num_duplicate_rows:,} rows repeat an earlier row")
    if manifest.num_leaked_rows:
        print(f"  left out   {manifest.num_leaked_rows:,} rows that eval or test has too (quarantine.jsonl)")
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
    print(f"{manifest.dataset} {manifest.version}  of {manifest.created_at:%Y-%m-%d %H:%M} UTC")
    print_manifest(manifest)
    for source in manifest.sources:
        print(f"  source     {source.name}  {source.num_rows:,} rows  sha256 {source.sha256[:16]}…")
