"""The verb `models`: list published models, promote and roll back by hand."""

from __future__ import annotations

import argparse
import getpass
import json
import socket
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.artifacts.champion import Champion
    from tercet.artifacts.registry import Version
    from tercet.storage import Storage


def add_models(verbs: Any, store: argparse.ArgumentParser) -> None:
    """Add the verbs; `store` has the flags that say where storage is."""
    models = verbs.add_parser("models", help="list published models, promote and roll back").add_subparsers(
        required=True, metavar="VERB"
    )
    listing = models.add_parser("list", parents=[store], help="list every model with its champion")
    listing.set_defaults(call=_list)
    show = models.add_parser("show", parents=[store], help="show the champion, all earlier ones, and all versions")
    show.add_argument("name", help="name of the model")
    show.add_argument("--json", action="store_true", help="print the documents as stored")
    show.set_defaults(call=_show)
    lineage = models.add_parser("lineage", parents=[store], help="trace a model to its run, data, shards and files")
    lineage.add_argument("name", help="name of the model")
    lineage.add_argument("--version", type=int, metavar="N", help="number of a version (the champion's)")
    lineage.set_defaults(call=_lineage)
    promote = models.add_parser(
        "promote", parents=[store], help="make a version the champion by hand, without the gate"
    )
    promote.add_argument("name", help="name of the model")
    which = promote.add_mutually_exclusive_group(required=True)
    which.add_argument("--version", type=int, metavar="N", help="number of a published version")
    which.add_argument("--run", metavar="RUN_ID", help="publish the best model of this run first")
    promote.add_argument("--reason", required=True, type=_text, help="kept in the champion's history")
    promote.set_defaults(call=_promote)
    rollback = models.add_parser("rollback", parents=[store], help="make an earlier champion serve again")
    rollback.add_argument("name", help="name of the model")
    rollback.add_argument(
        "--to", type=int, metavar="N", help="number of a version that served (the previous champion's)"
    )
    rollback.add_argument("--reason", required=True, type=_text, help="kept in the champion's history")
    rollback.set_defaults(call=_rollback)


def user_and_host() -> str:
    """Return `user@machine`, for the record of who promoted."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _text(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("give a reason of at least one word")
    return value.strip()


def _open(arguments: argparse.Namespace) -> Storage:
    from tercet.storage import open_storage

    return open_storage(arguments.storage, arguments.endpoint_url)


def _list(arguments: argparse.Namespace) -> None:
    from tercet.artifacts.champion import read_champion
    from tercet.artifacts.registry import list_models, list_versions

    storage = _open(arguments)
    names = list_models(storage)
    for name in names:
        champion = read_champion(storage, name)
        num_versions = len(list_versions(storage, name))
        versions = "1 version" if num_versions == 1 else f"{num_versions} versions"
        print(f"{name}  {versions}  {'no champion' if champion is None else _line(champion)}")
    if not names:
        print(f"no models in {storage.uri}")


def _show(arguments: argparse.Namespace) -> None:
    from tercet.artifacts.champion import history
    from tercet.artifacts.registry import list_versions, read_version, resolve

    storage = _open(arguments)
    versions = [read_version(storage, arguments.name, number) for number in list_versions(storage, arguments.name)]
    chain = history(storage, arguments.name)
    if arguments.json:
        champions = [champion.model_dump(mode="json") for champion in chain]
        print(json.dumps({"champions": champions, "versions": [v.model_dump(mode="json") for v in versions]}))
        return
    if chain or not versions:
        _, version = resolve(storage, arguments.name)
        print(f"{arguments.name}: version {version.number} serves, {storage.uri_of(version.commit.folder)}")
    else:
        print(f"{arguments.name} has no champion")
    for champion in chain:
        print(f"  {_line(champion)}")
        print(f"    {champion.reason}")
    for version in versions:
        data = ", ".join(f"{dataset} {number}" for dataset, number in version.lineage.dataset_versions.items())
        print(f"  version {version.number}  {_date(version.unix_seconds)}  run {version.lineage.run_id}  on {data}")


def _lineage(arguments: argparse.Namespace) -> None:
    from tercet.artifacts.registry import read_version, resolve
    from tercet.data.versions import read_manifest
    from tercet.planning.survey import read_plan

    storage, name = _open(arguments), arguments.name
    if arguments.version is None:
        champion, version = resolve(storage, name)
        print(f"{name}: {_line(champion)}")
    else:
        version = read_version(storage, name, arguments.version)
    for path, record in version.commit.model_files().items():
        if path.endswith(".safetensors"):
            print(f"  weights  {path}  sha256 {record.sha256}")
    print(f"  version  {version.number}, {storage.uri_of(version.commit.folder)}, step {version.commit.step}")
    print(f"  decided  {version.decision or 'by hand'}")
    plan = read_plan(storage, version.lineage.run_id)
    start = (
        "the base model" if plan.champion is None or plan.starts_from is None else f"version {plan.champion.version}"
    )
    print(f"  run      {plan.run_id}, recipe {version.lineage.recipe_hash}, from {start}")
    for part in plan.datasets:
        manifest = read_manifest(storage, part.name, part.version)
        print(f"  data     {part.text()}")
        for shard in manifest.splits["train"]:
            print(f"    shard  {shard.num_rows:>10,} rows  sha256 {shard.sha256}  {manifest.key_of(shard)}")
        for source in manifest.sources:
            print(f"    file   {source.num_rows:>10,} rows  sha256 {source.sha256}  {source.name}")


def _promote(arguments: argparse.Namespace) -> None:
    from tercet.artifacts.champion import read_champion
    from tercet.artifacts.registry import read_version, register, serve
    from tercet.planning.survey import read_plan

    storage, name = _open(arguments), arguments.name
    present = read_champion(storage, name)
    if arguments.run is None:
        version = read_version(storage, name, arguments.version)
    else:
        lineage = read_plan(storage, arguments.run).lineage
        version = register(storage, name, lineage, user_and_host())
    _serve(storage, present, version, serve(storage, version, present, "by hand", arguments.reason, user_and_host()))


def _rollback(arguments: argparse.Namespace) -> None:
    from tercet.artifacts.champion import history
    from tercet.artifacts.registry import read_version, serve
    from tercet.errors import ConfigError

    storage, name = _open(arguments), arguments.name
    chain = history(storage, name)
    before = [champion.version for champion in chain if champion.version != chain[0].version]
    if not before:
        raise ConfigError(
            f"model {name} never had another champion", hint="`tercet models promote` accepts any version"
        )
    number = before[0] if arguments.to is None else arguments.to
    if number not in before:
        served = ", ".join(map(str, sorted(set(before))))
        raise ConfigError(f"version {number} of {name} is not an earlier champion", hint=f"earlier champions: {served}")
    version = read_version(storage, name, number)
    _serve(storage, chain[0], version, serve(storage, version, chain[0], "rollback", arguments.reason, user_and_host()))


def _serve(storage: Storage, before: Champion | None, version: Version, champion: Champion) -> None:
    instead = "" if before is None else f" instead of version {before.version}"
    print(f"{champion.name}: version {version.number} serves{instead}, {storage.uri_of(version.commit.folder)}")


def _line(champion: Champion) -> str:
    what = {
        "gated": "promoted by the gate",
        "by hand": "promoted by hand, without the gate",
        "rollback": "restored by rollback",
    }
    return (
        f"generation {champion.generation}: version {champion.version}  {_date(champion.unix_seconds)}  "
        f"{what[champion.kind]}, {champion.who}"
    )


def _date(unix_seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix_seconds))
