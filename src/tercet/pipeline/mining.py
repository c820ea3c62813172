"""Hard negatives for the rows of a dataset version, by sentence-transformers' miner, into a dataset of their own.

Candidates for a row are the positives of its own split, so that no eval or test text gets into train: those of a pool
of rows that lie together. Pools are mined apart from each other, each in a process with a worker's resources. A
candidate that is nearly as near as the positive is probably another right answer, and is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tercet.artifacts.champion import read_champion
from tercet.artifacts.checkpoint import Commit
from tercet.artifacts.registry import resolve
from tercet.cluster import session
from tercet.config.recipe import Config
from tercet.config.sections import MiningConfig
from tercet.data.build import BuildResult, build_version
from tercet.data.cache import cache_dir_of, load_split
from tercet.data.ingest import IngestOptions
from tercet.data.manifest import SPLITS, Manifest
from tercet.data.row_checks import is_text
from tercet.data.versions import read_manifest
from tercet.errors import ConfigError, ObjectNotFound
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import Document, seal, unseal

logger = logging.getLogger("tercet")

ROWS_PER_POOL = 65_536


@dataclass(frozen=True)
class Pool:
    """Rows of a split that are each other's candidates."""

    split: str
    first_row: int
    num_rows: int


class Mined(Document):
    """What was mined from a version. Kept, because the model that mined it may not be the champion any more."""

    source: str
    """The version that was mined."""
    version: str
    """What came of it."""
    mining: MiningConfig
    model: str
    """That mined: where it lies in storage, or the base model's name."""


@dataclass(frozen=True)
class MineResult:
    """What was mined."""

    build: BuildResult
    num_rows: int
    num_random: int
    """Rows for which no candidate was far enough from the positive; they got a random one instead."""


def mine(config: Config, into: str, mining: MiningConfig, rows_per_pool: int = ROWS_PER_POOL) -> MineResult:
    """Mine the recipe's dataset with the model that its training would start from, and publish dataset `into`: the same
    rows in the same splits, with the negatives that were found.

    Raises ConfigError where `into` is the dataset itself, and what `build_version` raises."""
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    manifest = read_manifest(storage, config.dataset.name, config.dataset.version)
    if into == manifest.dataset:
        raise ConfigError(f"{into} is the dataset that is mined", hint="name another one")
    layout.dataset_prefix(into)  # refuse an impossible name before anything is mined
    commit = None
    if config.model.start_from == "champion" and read_champion(storage, config.name) is not None:
        commit = resolve(storage, config.name)[1].commit
    pools = [
        Pool(split, start, min(rows_per_pool, manifest.num_rows[split] - start))
        for split in SPLITS
        for start in range(0, manifest.num_rows[split], rows_per_pool)
    ]
    session.start_ray(config.workers)
    config = session.with_devices(config)
    tasks = {
        f"{pool.split} rows from {pool.first_row:,}": partial(mine_pool, config, manifest, commit, mining, pool)
        for pool in pools
    }
    found = session.in_fresh_processes(config.workers, tasks)
    columns = _columns(manifest, mining)
    names = [column.removeprefix("slice_") for column in columns]
    with tempfile.TemporaryDirectory(prefix="tercet-mine-") as folder:
        path = Path(folder) / f"{manifest.dataset}-{manifest.version}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for rows, _ in found.values():
                file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        built = build_version(
            [path],
            storage,
            into,
            IngestOptions(
                columns={column: column for column in columns if is_text(column)},
                group="group" if "group" in columns else None,
                slices=tuple(name for name, column in zip(names, columns, strict=True) if name != column),
            ),
            fractions=manifest.split_rule.fractions,
        )
    model = config.model.name_or_path if commit is None else commit.folder
    mined = Mined(source=manifest.version, version=built.manifest.version, mining=mining, model=model)
    storage.put(_key(into, manifest.version, mining), seal(mined))
    return MineResult(built, sum(len(rows) for rows, _ in found.values()), sum(num for _, num in found.values()))


def read_mined(storage: Storage, into: str, source: str, mining: MiningConfig) -> Mined | None:
    """What was mined from a version in this way, by whatever model. Raises CorruptObject."""
    key = _key(into, source, mining)
    try:
        return unseal(Mined, storage.read(key), storage.uri_of(key), hint="delete it: the next night mines again")
    except ObjectNotFound:
        return None


def _key(into: str, source: str, mining: MiningConfig) -> str:
    digest = hashlib.sha256(mining.model_dump_json().encode()).hexdigest()[:8]
    return layout.mined_key(into, source, digest)


def mine_pool(
    config: Config, manifest: Manifest, commit: Commit | None, mining: MiningConfig, pool: Pool
) -> tuple[list[list[str]], int]:
    """The rows of a pool in their order, with `_columns`; and how many of them have random negatives."""
    from tercet.model.libraries import import_quietly

    import_quietly()
    from sentence_transformers.util import mine_hard_negatives

    from tercet.model.encoder import load_model, reloaded

    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    labels = [column for column in manifest.columns if not is_text(column)]
    split = load_split(storage, manifest, pool.split, cache_dir_of(config.workers), ["anchor", "positive", *labels])
    rows = split.select(range(pool.first_row, pool.first_row + pool.num_rows))
    with tempfile.TemporaryDirectory(prefix="tercet-mine-") as folder:
        start = reloaded(config.model, storage, commit, Path(folder)) if commit else config.model
        model = load_model(start)
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that it has no switch for
            mined = mine_hard_negatives(
                rows.select_columns(["anchor", "positive"]),
                model,
                range_min=mining.range_min,
                max_score=mining.max_score,
                relative_margin=mining.relative_margin,
                num_negatives=mining.num_negatives,
                query_prompt=model.prompts.get("query"),
                corpus_prompt=model.prompts.get("document"),
                output_format="n-tuple",
                batch_size=config.evaluation.batch_size,
                verbose=False,
            )
    texts = [mined[name] for name in ("anchor", "positive", *_numbered(mining))]
    hard = {(anchor, positive): negatives for anchor, positive, *negatives in zip(*texts, strict=True)}
    found, num_random = _with_negatives(rows, labels, hard, mining, config.training.seed)
    logger.info(
        f"mined {pool.split} rows from {pool.first_row:,}: {len(found):,}, {num_random:,} with random negatives"
    )
    return found, num_random


def _with_negatives(
    rows: Any, labels: Sequence[str], hard: dict[tuple[str, str], list[str]], mining: MiningConfig, seed: int
) -> tuple[list[list[str]], int]:
    positives, rng, found, num_random = list(rows["positive"]), random.Random(seed), [], 0
    right: dict[str, set[str]] = {}
    for anchor, positive in zip(rows["anchor"], positives, strict=True):
        right.setdefault(anchor, {anchor}).add(positive)
    others = [list(rows[label]) for label in labels]
    for number, pair in enumerate(zip(rows["anchor"], positives, strict=True)):
        negatives = hard.get(pair)
        if negatives is None:
            negatives = _random_negatives(positives, right[pair[0]], mining.num_negatives, rng)
            num_random += 1
        if negatives:
            found.append([*pair, *negatives, *(values[number] for values in others)])
    return found, num_random


def _random_negatives(positives: list[str], right: set[str], num: int, rng: random.Random) -> list[str]:
    """So many different texts that are no right answer; none where the pool has not so many."""
    chosen: dict[str, None] = {}
    for text in rng.sample(positives, len(positives)):
        if text not in right:
            chosen[text] = None
        if len(chosen) == num:
            return list(chosen)
    return []


def _columns(manifest: Manifest, mining: MiningConfig) -> list[str]:
    negatives = ["negative"] if mining.num_negatives == 1 else _numbered(mining)
    return ["anchor", "positive", *negatives, *(column for column in manifest.columns if not is_text(column))]


def _numbered(mining: MiningConfig) -> list[str]:
    """As the miner names them."""
    return [f"negative_{number}" for number in range(1, mining.num_negatives + 1)]
