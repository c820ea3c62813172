"""The verbs `nightly` and `nights`: run one night, list the outcomes of all."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.pipeline.nightly import Night

REFUSED_EXIT_CODE = 8  # besides those of errors.py: the night is over, but something is wrong with its model


def add_nightly(verbs: Any, recipe: argparse.ArgumentParser, store: argparse.ArgumentParser) -> None:
    """Add both commands. recipe: parser with the flags of a run. store: parser with the flags of storage."""
    nightly = verbs.add_parser(
        "nightly", parents=[recipe], help="add new rows, train, and keep or replace the champion"
    )
    nightly.add_argument("--json", action="store_true", help="print the outcome as stored")
    nightly.set_defaults(call=_nightly)
    nights = verbs.add_parser("nights", parents=[store], help="list the outcomes of a model's nights")
    nights.add_argument("name", help="name of the model")
    nights.set_defaults(call=_nights)


def _nightly(arguments: argparse.Namespace) -> int:
    from tercet.cli.models import user_and_host
    from tercet.config.recipe import load_config
    from tercet.pipeline.nightly import nightly

    config = load_config(arguments.recipe, arguments.overrides)
    night = nightly(config, user_and_host(), lambda text: print(text, file=sys.stderr, flush=True))
    print(night.model_dump_json(indent=1) if arguments.json else night_text(night))
    return REFUSED_EXIT_CODE if night.outcome == "refused" else 0


def _nights(arguments: argparse.Namespace) -> None:
    from tercet.pipeline.nightly import list_nights, read_night
    from tercet.storage import open_storage

    storage = open_storage(arguments.storage, arguments.endpoint_url)
    run_ids = list_nights(storage, arguments.name)
    for run_id in run_ids:
        night = read_night(storage, arguments.name, run_id)
        if night is not None:
            print(f"{night.date}  {night.outcome:<12}  {run_id}\n    {night.sentence}")
            if night.warning is not None:
                print(f"    Warning: {night.warning}")
    if not run_ids:
        print(f"no nights of model {arguments.name} in {storage.uri}")


def night_text(night: Night) -> str:
    """Human-readable outcome of a night."""
    lines = [f"Night of {night.date}: {night.outcome.replace('_', ' ')}", f"  {night.sentence}"]
    if night.warning is not None:
        lines.append(f"  Warning: {night.warning}")
    data = ", ".join(f"{name} {version}" for name, version in night.dataset_versions.items())
    lines += ["", f"  run       {night.run_id}, {night.seconds:.0f} s", f"  data      {data}"]
    names = sorted({name for metrics in night.metrics.values() for name in metrics})
    for role, metrics in night.metrics.items():
        values = "  ".join(f"{name} {metrics[name]:.4f}" for name in names if name in metrics)
        lines.append(f"  test      {role:<12} {values}")
    if night.index_impact is not None:
        index = night.index_impact
        lines.append(
            f"  index     {index.overlap_at_10:.0%} of the ten nearest stay, scores move by "
            f"{index.mean_score_shift:+.3f}; embedding {index.num_rows:,} rows again takes "
            f"{_duration(index.embedding_seconds)}"
        )
    if night.champion is not None:
        before = (
            ""
            if night.champion_before in (None, night.champion)
            else f", which replaced generation {night.champion_before}"
        )
        lines.append(f"  champion  generation {night.champion}{before}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
