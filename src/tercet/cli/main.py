"""The commands, and how errors become messages and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tercet import __version__
from tercet.cli.datasets import add_datasets, print_manifest
from tercet.cli.models import add_models
from tercet.cli.nightly import add_nightly
from tercet.config.examples import example_names, example_path
from tercet.errors import StartAgain, TercetError, first_line

if TYPE_CHECKING:
    from tercet.artifacts.report import RunReport
    from tercet.config.recipe import Config

DEFAULT_STORAGE = "./tercet-store"
JOB_SERVER = "http://127.0.0.1:8265"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, the error's own (see errors.py), or 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        result: int = arguments.call(arguments) or 0
    except TercetError as error:
        if arguments.debug:
            raise
        print(f"tercet: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  → {error.hint}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # from a local file; storage raises errors of its own
        if arguments.call is _worker:  # from whatever the training has open, which a traceback names best
            raise
        if isinstance(error, BrokenPipeError):  # what read the output has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if arguments.debug or error.filename is None:
            raise
        print(f"tercet: {error.filename}: {error.strerror}", file=sys.stderr)
        print("  → check the path, its permissions and the disk", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tercet: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tercet", description="Fine-tune sentence-embedding models on triplets.")
    parser.add_argument("--version", action="version", version=f"tercet {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    changes = argparse.ArgumentParser(add_help=False, parents=[common])
    changes.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=value", help="change a value of the recipe"
    )
    recipe = argparse.ArgumentParser(add_help=False, parents=[changes])
    recipe.add_argument("recipe", type=Path, help="a YAML file; `tercet recipe` prints an example")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--run-id", help="instead of the id derived from date, recipe and data")
    store = argparse.ArgumentParser(add_help=False, parents=[common])
    store.add_argument("--storage", default=DEFAULT_STORAGE, help="local folder or s3://bucket/prefix (%(default)s)")
    store.add_argument("--endpoint-url", help="address of an S3 server other than AWS")

    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    add_datasets(verbs, common, recipe, store, DEFAULT_STORAGE)
    plan = verbs.add_parser(
        "plan", parents=[recipe, named], help="show everything derived from a recipe; start nothing"
    )
    plan.add_argument("--json", action="store_true", help="print the whole plan, as the workers read it")
    plan.set_defaults(call=_plan)
    train = verbs.add_parser(
        "train", parents=[recipe, named], help="run a recipe, here or on the cluster at RAY_ADDRESS"
    )
    train.set_defaults(call=_train)
    submit = verbs.add_parser("submit", parents=[recipe, named], help="run a recipe on a cluster, as a Ray job")
    submit.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS", JOB_SERVER), help="of the Ray job server (%(default)s)"
    )
    submit.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    submit.set_defaults(call=_submit)

    worker = verbs.add_parser("worker", parents=[common], help="train one rank of a plan without Ray, under torchrun")
    worker.add_argument("plan", type=Path, help="the output of `tercet plan --json`")
    worker.set_defaults(call=_worker)

    runs = verbs.add_parser("runs", help="list, show and verify runs").add_subparsers(required=True, metavar="VERB")
    listing = runs.add_parser("list", parents=[store], help="list every run with its result")
    listing.set_defaults(call=_runs_list)
    show = runs.add_parser("show", parents=[store], help="show the report of one run")
    show.add_argument("run_id")
    show.add_argument("--json", action="store_true", help="print report.json")
    show.set_defaults(call=_runs_show)

    verify = runs.add_parser(
        "verify", parents=[store], help="prove that each pass over the data consumed each row once"
    )
    verify.add_argument("run_id")
    verify.set_defaults(call=_runs_verify)

    add_nightly(verbs, recipe, store)
    add_models(verbs, store)
    demo = verbs.add_parser("demo", parents=[changes], help="end-to-end demo on built-in data")
    demo.add_argument("--recipe", type=Path, default=example_path("demo"), help="another recipe (%(default)s)")
    demo.set_defaults(call=_demo)
    example = verbs.add_parser("recipe", parents=[common], help="print an example recipe to start from")
    example.add_argument(
        "name", nargs="?", default="own_data", choices=example_names(), help="%(choices)s (%(default)s)"
    )
    example.set_defaults(call=_recipe)
    schema = verbs.add_parser("schema", parents=[common], help="print the JSON Schema of recipes, for editors")
    schema.set_defaults(call=_schema)
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    from tercet.config.recipe import load_config

    return load_config(arguments.recipe, arguments.overrides)


def _plan(arguments: argparse.Namespace) -> None:
    from tercet.planning.survey import survey

    _, plan = survey(_config(arguments), arguments.run_id)
    if arguments.json:
        print(plan.model_dump_json(indent=1))
        return
    from tercet.cli.screens import plan_text

    print(plan_text(plan))


def _train(arguments: argparse.Namespace) -> None:
    from tercet.pipeline.run import run

    config = _config(arguments)
    report = run(config, arguments.run_id)
    _print_report(report, arguments.recipe)


def _worker(arguments: argparse.Namespace) -> None:
    from tercet.planning.survey import plan_of_file
    from tercet.training.worker import notice_of_sigterm, run_worker

    notice = notice_of_sigterm()
    while True:
        try:
            return run_worker(plan_of_file(arguments.plan), notice=notice)
        except StartAgain as error:
            if error.needs_new_processes:
                raise


def _print_report(report: RunReport, recipe: Path) -> None:
    from tercet.cli.screens import next_commands, screen

    print(screen(report, next_commands(report, str(recipe))))


def _submit(arguments: argparse.Namespace) -> None:
    from tercet.cluster.jobs import submit
    from tercet.planning.survey import read_report, survey

    config = _config(arguments)
    storage, plan = survey(config, arguments.run_id)
    report = read_report(storage, plan.run_id)
    if report is None or report.status != "finished":
        submit(plan, config, arguments.address, lambda text: print(text, flush=True), follow=not arguments.no_wait)
    else:
        print(f"{plan.run_id} has already finished; this is its result")
        _print_report(report, arguments.recipe)


def _runs_list(arguments: argparse.Namespace) -> None:
    from tercet.planning.survey import list_runs, read_report
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    run_ids = list_runs(storage)
    for run_id in run_ids:
        report = read_report(storage, run_id)
        if report is None:
            print(f"{run_id}  not finished")
        elif report.metrics is None:
            print(f"{run_id}  failed in {report.failed_stage}: {first_line(report.error)}")
        else:
            value = report.metrics.best_test[report.metric]
            print(f"{run_id}  finished  test {report.metric} {value:.4f} ({report.gain:+.4f})")
    if not run_ids:
        print(f"no run in {storage.uri}")


def _runs_show(arguments: argparse.Namespace) -> None:
    from tercet.cli.screens import screen
    from tercet.errors import ConfigError
    from tercet.planning.survey import list_runs, read_report, unknown_run
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    report = read_report(storage, arguments.run_id)
    if report is None:
        if arguments.run_id not in list_runs(storage):
            raise unknown_run(storage, arguments.run_id)
        raise ConfigError(
            f"run {arguments.run_id} has not finished in {storage.uri}", hint="the command that started it resumes it"
        )
    print(report.model_dump_json(indent=1) if arguments.json else screen(report, []))


def _runs_verify(arguments: argparse.Namespace) -> int:
    from tercet.errors import TrainingError
    from tercet.planning.survey import read_plan
    from tercet.storage import open_storage
    from tercet.training.ledger import verify_rows

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    proof = verify_rows(storage, read_plan(storage, arguments.run_id))
    print(proof.text())
    return 0 if proof.holds else TrainingError.exit_code


def _demo(arguments: argparse.Namespace) -> None:
    import tempfile
    import time

    from tercet.cli.demo_data import write_triplets
    from tercet.config.recipe import load_config
    from tercet.data.build import build_version
    from tercet.data.ingest import IngestOptions
    from tercet.pipeline.run import run
    from tercet.storage import open_storage

    config = load_config(arguments.recipe, arguments.overrides)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stdlib.jsonl"
        num_rows = write_triplets(source)
        print(
            f"{num_rows:,} triplets from the docstrings of Python {sys.version.split()[0]}'s standard library",
            flush=True,
        )
        storage = open_storage(config.storage.uri, config.storage.endpoint_url)
        result = build_version([str(source)], storage, config.dataset.name, IngestOptions(group="group"))
    print(f"{result.manifest.dataset} {result.manifest.version} in {storage.uri} ({time.monotonic() - started:.1f} s)")
    print_manifest(result.manifest)
    print("starting Ray and its workers; training begins in about half a minute", flush=True)
    _print_report(run(config), arguments.recipe)
    print(f"\nThe whole demo took {time.monotonic() - started:.0f} s.")


def _recipe(arguments: argparse.Namespace) -> None:
    print(example_path(arguments.name).read_text(encoding="utf-8"), end="")


def _schema(arguments: argparse.Namespace) -> None:  # noqa: ARG001 - every command has this signature
    from tercet.config.recipe import Config

    print(json.dumps(Config.model_json_schema(), indent=1))
