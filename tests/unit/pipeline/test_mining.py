"""Hard negatives are near, of the same split, and no right answers. Mined in this process, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from support import tiny_model
from tercet.cluster import session
from tercet.config.recipe import Config
from tercet.config.sections import MiningConfig
from tercet.data.build import build_version
from tercet.data.cache import load_split
from tercet.data.ingest import IngestOptions
from tercet.data.manifest import Manifest
from tercet.data.versions import read_manifest
from tercet.errors import ConfigError
from tercet.pipeline import mining
from tercet.pipeline.mining import LIBRARYS_QUERIES, MineResult, mine, queries_at_once, read_mined
from tercet.storage import Storage, open_storage

NUM_ROWS = 300


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model that knows the task: a word and its partner have the same embedding."""
    folder = tiny_model.tiny_bert(tmp_path_factory.mktemp("model") / "bert", tiny_model.all_texts())
    weights = load_file(folder / "model.safetensors")
    words = weights["embeddings.word_embeddings.weight"]
    tokens = SentenceTransformer(str(folder), device="cpu").tokenizer.convert_tokens_to_ids
    for word, partner in zip(tiny_model.WORDS, tiny_model.PARTNERS, strict=True):
        words[tokens(word)] *= 10
        words[tokens(partner)] = words[tokens(word)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Make a dataset of pairs with a language. Every third anchor has a second right answer."""

    def here(_: Any, tasks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        return {name: task() for name, task in tasks.items()}

    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "start_ray", lambda _: None)
    monkeypatch.setattr(session, "with_devices", lambda config: config)
    monkeypatch.setattr(session, "in_fresh_processes", here)
    rows = []
    for number, row in enumerate(tiny_model.triplets(NUM_ROWS)):
        pair = {key: row[key] for key in ("anchor", "positive", "group")} | {"lang": "ab"[number % 2]}
        rows += [pair, {**pair, "positive": row["negative"]}] if number % 3 == 0 else [pair]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage, columns = open_storage(str(tmp_path / "store")), {"anchor": "anchor", "positive": "positive"}
    build_version(
        [path],
        storage,
        "pairs",
        IngestOptions(columns=columns, group="group", slices=("lang",)),
        fractions=(0.7, 0.1, 0.2),
    )
    return storage


def config(storage: Storage, model_dir: Path) -> Config:
    return Config.model_validate(tiny_model.recipe(model_dir, storage.uri, dataset={"name": "pairs"}))


def rows_of(storage: Storage, manifest: Manifest) -> dict[str, list[dict[str, str]]]:
    return {split: list(load_split(storage, manifest, split)) for split in ("train", "eval", "test")}


def mined(storage: Storage, model_dir: Path, how: MiningConfig, rows_per_pool: int = 65_536) -> MineResult:
    return mine(config(storage, model_dir), "mined", how, rows_per_pool)


@pytest.mark.parametrize("rows_per_pool", [65_536, 60])
def test_every_row_stays_in_its_split_with_a_negative_of_that_split(
    storage: Storage, model_dir: Path, rows_per_pool: int
) -> None:
    result = mined(storage, model_dir, MiningConfig(relative_margin=0.0), rows_per_pool)
    before, after = (rows_of(storage, read_manifest(storage, name)) for name in ("pairs", "mined"))
    for split, rows in after.items():
        kept = [{key: value for key, value in row.items() if key != "negative"} for row in rows]
        assert kept == before[split]
        right: dict[str, set[str]] = {}
        for row in rows:
            right.setdefault(row["anchor"], set()).add(row["positive"])
        assert {row["negative"] for row in rows} <= {row["positive"] for row in rows}
        assert [row for row in rows if row["negative"] in right[row["anchor"]]] == []
    assert result.num_rows == sum(len(rows) for rows in after.values())
    assert result.build.manifest.num_bad_rows == 0
    assert result.num_random < result.num_rows / 2


def test_negatives_are_near_but_not_too_near(storage: Storage, model_dir: Path) -> None:
    model = SentenceTransformer(str(model_dir), device="cpu")
    means = {}
    for margin in (0.0, 0.3):
        result = mined(storage, model_dir, MiningConfig(relative_margin=margin))
        rows = rows_of(storage, result.build.manifest)["train"]
        anchors, positives, negatives = (
            model.encode([row[name] for row in rows], convert_to_tensor=True)
            for name in ("anchor", "positive", "negative")
        )
        right, wrong = (model.similarity_pairwise(anchors, others) for others in (positives, negatives))
        too_near = int((wrong > right * (1 - margin) + 1e-4).sum())
        assert too_near <= result.num_random  # random negatives may be
        means[margin] = float(wrong.mean())
        assert result.num_random < result.num_rows
    assert means[0.0] > means[0.3]


def test_several_negatives(storage: Storage, model_dir: Path) -> None:
    manifest = mined(storage, model_dir, MiningConfig(num_negatives=3)).build.manifest
    assert manifest.columns == ("anchor", "positive", "negative_1", "negative_2", "negative_3", "group", "slice_lang")
    for row in rows_of(storage, manifest)["test"]:
        assert len({row["positive"], *(row[f"negative_{number}"] for number in (1, 2, 3))}) == 4


def test_mining_is_recorded(storage: Storage, model_dir: Path) -> None:
    source, mining = read_manifest(storage, "pairs").version, MiningConfig()
    assert read_mined(storage, "mined", source, mining) is None
    version = mined(storage, model_dir, mining).build.manifest.version
    mined_version = read_mined(storage, "mined", source, mining)
    assert mined_version is not None
    assert (mined_version.version, mined_version.model) == (version, str(model_dir))
    assert read_mined(storage, "mined", source, MiningConfig(relative_margin=0.2)) is None


def test_a_dataset_is_not_mined_into_itself(storage: Storage, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="dataset pairs cannot be mined into itself"):
        mine(config(storage, model_dir), "pairs", MiningConfig())


def test_the_miner_of_a_gpu_finds_the_same_negatives(
    storage: Storage, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with its arithmetic on the CPU. It is packed, and its similarities are those of the model."""
    with monkeypatch.context() as patch:
        patch.setattr(mining, "runs_on_gpu", lambda _: True)
        packed = rows_of(storage, mined(storage, model_dir, MiningConfig()).build.manifest)
    assert packed == rows_of(storage, mined(storage, model_dir, MiningConfig()).build.manifest)


@pytest.mark.parametrize("num_queries", [1, 5, 99, 100, 101, 1000, 70_000])
@pytest.mark.parametrize("num_texts", [1, 100, 65_536])
def test_scores_are_bounded(num_queries: int, num_texts: int) -> None:
    """One block as in sentence-transformers where that fits, else blocks of about equal size."""
    at_once = queries_at_once(num_queries, num_texts, max_bytes=4 * 100 * 1000)
    if at_once != LIBRARYS_QUERIES:
        assert at_once * num_texts <= max(100 * 1000, num_texts)
        num_blocks = -(-num_queries // at_once)
        assert num_queries - (num_blocks - 1) * at_once >= at_once - num_blocks


def test_small_blocks_find_the_same_negatives(
    storage: Storage, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rows_of(storage, mined(storage, model_dir, MiningConfig()).build.manifest)
    monkeypatch.setattr(mining, "queries_at_once", lambda *_: 64)
    assert rows_of(storage, mined(storage, model_dir, MiningConfig()).build.manifest) == one
