"""Hard negatives for the rows of a dataset version, found by sentence-transformers' miner, as a dataset of their own.

Each split is cut into pools of consecutive rows, and each pool is mined alone, in a process with a worker's resources.
The candidates for a row are the positives of its pool, so no eval or test text gets into train. A candidate that is
nearly as similar as the positive is probably another right answer, so it is excluded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
MAX_SCORE_BYTES = 512 * 2**20
"""Size of the scores that exist at one time, in fp32."""
LIBRARYS_QUERIES = 16_384
"""Queries that `mine_hard_negatives` of sentence-transformers 6.2 compares with all texts at once."""


@dataclass(frozen=True)
class Pool:
    """Rows of a split that are each other's candidates."""

    split: str
    first_row: int
    num_rows: int


class Mined(Document):
    """Record of how a version was mined. The model that mined it may not be the champion any more."""

    source: str
    """Version that was mined."""
    version: str
    """Version of the mined dataset."""
    mining: MiningConfig
    model: str
    """Model that mined: its folder in storage, or the name of the base model."""
    precision: str | None = None
    """Precision in which the texts were embedded; None in what earlier versions of tercet wrote."""


class MinedPool(NamedTuple):
    """Outcome of `mine_pool`."""

    rows: list[list[str]]
    """Rows in order, as values of `_columns`."""
    num_random: int
    """Rows with random negatives."""
    precision: str


@dataclass(frozen=True)
class MineResult:
    """Outcome of `mine`."""

    build: BuildResult
    num_rows: int
    num_random: int
    """Rows with random negatives, because no candidate differed enough from the positive."""


def mine(config: Config, into: str, mining: MiningConfig, rows_per_pool: int = ROWS_PER_POOL) -> MineResult:
    """Mine the recipe's dataset with the model that its training would start from, and publish it as dataset `into`.

    The rows and their splits are the same; the negatives are those that were mined. Raises ConfigError if `into` is the
    dataset itself, and whatever `build_version` raises."""
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    manifest = read_manifest(storage, config.dataset.name, config.dataset.version)
    if into == manifest.dataset:
        raise ConfigError(f"dataset {into} cannot be mined into itself", hint="give the mined dataset another name")
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
    pool_results = session.in_fresh_processes(config.workers, tasks)
    columns = _columns(manifest, mining)
    names = [column.removeprefix("slice_") for column in columns]
    with tempfile.TemporaryDirectory(prefix="tercet-mine-") as folder:
        path = Path(folder) / f"{manifest.dataset}-{manifest.version}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for result in pool_results.values():
                file.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in result.rows)
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
    mined = Mined(
        source=manifest.version,
        version=built.manifest.version,
        mining=mining,
        model=model,
        precision=", ".join(sorted({result.precision for result in pool_results.values()})),
    )
    storage.put(_key(into, manifest.version, mining), seal(mined))
    return MineResult(
        build=built,
        num_rows=sum(len(result.rows) for result in pool_results.values()),
        num_random=sum(result.num_random for result in pool_results.values()),
    )


def read_mined(storage: Storage, into: str, source: str, mining: MiningConfig) -> Mined | None:
    """Return the record of how version `source` was mined with these settings, or None. Raises CorruptObject."""
    key = _key(into, source, mining)
    try:
        return unseal(Mined, storage.read(key), storage.uri_of(key), hint="delete it; the next night will mine again")
    except ObjectNotFound:
        return None


def _key(into: str, source: str, mining: MiningConfig) -> str:
    digest = hashlib.sha256(mining.model_dump_json().encode()).hexdigest()[:8]
    return layout.mined_key(into, source, digest)


def mine_pool(config: Config, manifest: Manifest, commit: Commit | None, mining: MiningConfig, pool: Pool) -> MinedPool:
    """Mine the rows of a pool in this process: on its GPU packed and in the recipe's precision, on a CPU in fp32."""
    from tercet.model.libraries import import_quietly

    import_quietly()
    from sentence_transformers.util import mine_hard_negatives

    from tercet.evaluation.gpu_miner import GpuMiner, mining_precision
    from tercet.model.devices import own_device
    from tercet.model.encoder import load_model, reloaded

    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    labels = [column for column in manifest.columns if not is_text(column)]
    split = load_split(storage, manifest, pool.split, cache_dir_of(config.workers), ["anchor", "positive", *labels])
    rows = split.select(range(pool.first_row, pool.first_row + pool.num_rows))
    with tempfile.TemporaryDirectory(prefix="tercet-mine-") as folder:
        start = reloaded(config.model, storage, commit, Path(folder)) if commit else config.model
        model = load_model(start, own_device(config.workers))
        precision = mining_precision(config, model.device)
        miner = GpuMiner(model, config, precision) if runs_on_gpu(model) else model
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be switched off
            mined = mine_hard_negatives(
                rows.select_columns(["anchor", "positive"]),
                miner,
                range_min=mining.range_min,
                max_score=mining.max_score,
                relative_margin=mining.relative_margin,
                num_negatives=mining.num_negatives,
                query_prompt=model.prompts.get("query"),
                corpus_prompt=model.prompts.get("document"),
                output_format="n-tuple",
                batch_size=config.evaluation.batch_size,
                faiss_batch_size=queries_at_once(len(set(rows["anchor"])), len(set(rows["positive"]))),
                verbose=False,
            )
    texts = [mined[name] for name in ("anchor", "positive", *_numbered(mining))]
    hard = {(anchor, positive): negatives for anchor, positive, *negatives in zip(*texts, strict=True)}
    mined_rows, num_random = _with_negatives(rows, labels, hard, mining, config.training.seed)
    logger.info(
        f"mined {pool.split} rows from {pool.first_row:,}: {len(mined_rows):,}, {num_random:,} with random negatives"
    )
    return MinedPool(mined_rows, num_random, precision)


def runs_on_gpu(model: Any) -> bool:
    """Return whether a model is mined with on a GPU. On a CPU, the negatives stay those of the library to the bit."""
    return bool(model.device.type != "cpu")


def queries_at_once(num_queries: int, num_texts: int, max_bytes: int = MAX_SCORE_BYTES) -> int:
    """Return how many queries to compare with the texts at a time: as many as sentence-transformers would, unless their
    scores take more than `max_bytes`.

    Then the blocks are of about equal size: the product of a very small one could round otherwise."""
    limit = max(1, max_bytes // (4 * num_texts))
    if limit >= LIBRARYS_QUERIES:
        return LIBRARYS_QUERIES
    return math.ceil(num_queries / math.ceil(num_queries / limit))


def _with_negatives(
    rows: Any, labels: Sequence[str], hard: dict[tuple[str, str], list[str]], mining: MiningConfig, seed: int
) -> tuple[list[list[str]], int]:
    positives, rng, num_random = list(rows["positive"]), random.Random(seed), 0
    mined_rows: list[list[str]] = []
    right: dict[str, set[str]] = {}  # texts that are no negative of an anchor
    for anchor, positive in zip(rows["anchor"], positives, strict=True):
        right.setdefault(anchor, {anchor}).add(positive)
    others = [list(rows[label]) for label in labels]
    for number, pair in enumerate(zip(rows["anchor"], positives, strict=True)):
        negatives = hard.get(pair)
        if negatives is None:
            negatives = _random_negatives(positives, right[pair[0]], mining.num_negatives, rng)
            num_random += 1
        if negatives:
            mined_rows.append([*pair, *negatives, *(values[number] for values in others)])
    return mined_rows, num_random


def _random_negatives(positives: list[str], right: set[str], num: int, rng: random.Random) -> list[str]:
    """Return exactly `num` different texts that are no right answer, or none if the pool has fewer."""
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
    """Return the miner's names of several negatives."""
    return [f"negative_{number}" for number in range(1, mining.num_negatives + 1)]
