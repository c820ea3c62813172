"""Fixtures of whole runs: tiny models, a sharded dataset, and the environment of what a test starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support import tiny_model
from support.commands import LEFT_OUT
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.storage import open_storage


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder of this session's runs: shards, and the code of models that bring their own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two BERT layers, mean pooling and a Dense layer, without dropout."""
    return tiny_model.tiny_bert(tmp_path_factory.mktemp("model") / "bert", tiny_model.all_texts(), dense_features=48)


@pytest.fixture(scope="session")
def tiny_stella_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with modeling code of its own, and a Dense layer of 1,024 features."""
    return tiny_model.tiny_stella(tmp_path_factory.mktemp("model") / "stella")


@pytest.fixture(scope="session")
def tiny_new_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of stella_en_400M_v5, in miniature."""
    return tiny_model.tiny_new(tmp_path_factory.mktemp("model") / "new")


@pytest.fixture(scope="session")
def triplets_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 triplets with groups."""
    return tiny_model.write_triplets(tmp_path_factory.mktemp("data") / "triplets.jsonl")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, triplets_file: Path) -> Path:
    """A storage folder with the dataset `tiny`, shared by the runs of all modules, which have different ids."""
    folder = tmp_path_factory.mktemp("store")
    build_version([triplets_file], open_storage(str(folder)), "tiny", IngestOptions(group="group"))
    return folder


@pytest.fixture(scope="session")
def environment(cache_dir: Path) -> dict[str, str]:
    """The environment of every process that a test starts: offline, one thread, this Python first on PATH."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return {
        **mine,
        "PYTHON": sys.executable,
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "TERCET_CACHE_DIR": str(cache_dir),
        "HF_HOME": str(cache_dir / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": "127.0.0.1",
    }
