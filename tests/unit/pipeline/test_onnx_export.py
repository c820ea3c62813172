"""A version is exported as one ONNX file, which is valid only after it was measured again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from sentence_transformers import SentenceTransformer

from support import tiny_model
from support.published import as_best_model
from tercet.artifacts.registry import Lineage, register, serve
from tercet.config.recipe import Config
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.pipeline import onnx_export
from tercet.pipeline.onnx_export import Exported
from tercet.pipeline.publishers import notify
from tercet.planning.survey import survey
from tercet.storage import Storage, open_storage
from tercet.storage.documents import seal, unseal
from tercet.storage.layout import plan_key


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with a Dense layer, so that the file must hold more than the transformer."""
    folder = tmp_path_factory.mktemp("model") / "bert"
    return tiny_model.tiny_bert(folder, tiny_model.all_texts(), dense_features=48, normalize=True)


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return a recipe whose storage has the tiny model of a run as the champion."""
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))
    storage = open_storage(str(tmp_path / "store"))
    build_version([tiny_model.write_triplets(tmp_path / "t.jsonl")], storage, "tiny", IngestOptions(group="group"))
    publish = {"publish": {"onnx": True}}
    config = Config.model_validate(tiny_model.recipe(model_dir, storage.uri, nightly=publish))
    plan = survey(config, "a-run")[1]
    storage.put(plan_key("a-run"), seal(plan))
    as_best_model(storage, "a-run", model_dir)
    lineage = Lineage(run_id="a-run", recipe_hash="", dataset_versions={"tiny": plan.dataset_version})
    serve(storage, register(storage, "tiny", lineage, "me"), None, "by hand", "the first", "me")
    return config


def store(config: Config) -> Storage:
    return open_storage(config.storage.uri)


def test_the_file_gives_the_models_embeddings(config: Config, model_dir: Path) -> None:
    said: list[str] = []
    assert notify(store(config), config, said.append) == {}
    folder = Path(said[0].removeprefix("notified: onnx "))
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "tokenizer.json", "EXPORTED"}
    exported = unseal(Exported, (folder / "EXPORTED").read_bytes(), "")
    assert exported.metrics == pytest.approx(exported.metrics_before, abs=1e-6)
    assert exported.metrics.keys() == {"ndcg@10", "mrr@10", "triplet_accuracy"}
    model = SentenceTransformer(str(model_dir), device="cpu")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for texts in (["one"], tiny_model.all_texts()[:7], ["so many words " * 8, "few"]):
        features = model.preprocess(texts)
        [embeddings] = session.run(None, {name: features[name].numpy() for name in exported.inputs})
        assert np.allclose(embeddings, model.encode(texts), atol=1e-5)


def test_a_file_with_other_metrics_is_not_published(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    running = onnx_export._running

    @contextlib.contextmanager
    def wrong(model: Any, path: Path, inputs: tuple[str, ...]) -> Iterator[None]:
        with running(model, path, inputs):
            right = model.forward

            def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
                outputs = right(features)
                return {**outputs, onnx_export.OUTPUT: outputs[onnx_export.OUTPUT].flip(0)}

            model.forward = forward
            yield

    monkeypatch.setattr(onnx_export, "_running", wrong)
    problems = notify(store(config), config, lambda _: None)
    assert problems["onnx"].startswith("CorruptObject: version 1 has other metrics as ONNX: ndcg@10 ")
    assert store(config).list("models/tiny/onnx") == []
    monkeypatch.setattr(onnx_export, "_running", running)
    assert notify(store(config), config, lambda _: None) == {}  # the next night
