"""Only the adapter is trained; it is published merged, and training can resume from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from support.tiny_model import all_texts, tiny_bert, triplets
from tercet.config.sections import LoraConfig, ModelConfig
from tercet.errors import ConfigError, CorruptObject
from tercet.model.encoder import make_model
from tercet.model.host_model import HostModel
from tercet.model.lora import ADAPTER_FOLDER, TRAINED_WEIGHTS

TEXTS = [row["anchor"] for row in triplets(6)]
ATTENTION = ("query", "key", "value")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("lora") / "base", all_texts(), dense_features=8)


def config(base: Path, **lora: Any) -> ModelConfig:
    values = {"rank": 4, "alpha": 8.0, "target_modules": ATTENTION, **lora}
    return ModelConfig(name_or_path=str(base), lora=LoraConfig(**values))


def trained(base: Path, **lora: Any) -> SentenceTransformer:
    """Change every trained weight, as training would."""
    model = make_model(config(base, **lora), "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model: SentenceTransformer, base: Path, folder: Path, **lora: Any) -> Path:
    host_model = HostModel.of(config(base, **lora), model, is_gathered=True)
    host_model.take(model, torch.Tensor.copy_)
    host_model.write(folder)
    return folder


@pytest.mark.parametrize(("targets", "per_layer"), [(("query",), 1), (ATTENTION, 3), ("all-linear", 6)])
def test_only_adapters_and_dense_are_trained(
    base: Path, targets: tuple[str, ...] | Literal["all-linear"], per_layer: int
) -> None:
    model = make_model(config(base, target_modules=targets), "cpu")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) == 2 * per_layer
    assert {name for name in names if "lora" not in name} == {"2.linear.weight", "2.linear.bias"}
    assert not any("pooler" in name and "lora" in name for name, _ in model.named_parameters())


def test_a_new_adapter_changes_nothing(base: Path) -> None:
    plain = SentenceTransformer(str(base), device="cpu").encode(TEXTS)
    assert abs(make_model(config(base), "cpu").encode(TEXTS) - plain).max() < 1e-6


@pytest.mark.parametrize("targets", [ATTENTION, "all-linear"])
def test_the_saved_model_is_merged(base: Path, tmp_path: Path, targets: Any) -> None:
    model = trained(base, target_modules=targets)
    embeddings = model.eval().encode(TEXTS)
    assert abs(embeddings - SentenceTransformer(str(base), device="cpu").encode(TEXTS)).max() > 1e-2
    folder = save(model, base, tmp_path / "saved", target_modules=targets)
    plain = SentenceTransformer(str(folder), device="cpu")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    assert abs(plain.encode(TEXTS) - embeddings).max() < 1e-6 * abs(embeddings).max()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_peft_loads_the_adapter(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    folder = save(model, base, tmp_path / "saved")
    adapted = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder / ADAPTER_FOLDER).eval()
    tokens = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval().transformers_model(**tokens).last_hidden_state
        assert (adapted(**tokens).last_hidden_state - wanted).abs().max() < 1e-6


def test_a_run_resumes_with_the_trained_weights(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    again = make_model(config(base), "cpu", resume_dir=save(model, base, tmp_path / "saved"))
    left, right = dict(model.named_parameters()), dict(again.named_parameters())
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(left[name].requires_grad == right[name].requires_grad for name in left)


def test_only_trained_weights_are_saved_beside_the_model(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    kept = load_file(save(model, base, tmp_path / "saved") / TRAINED_WEIGHTS)
    assert kept.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("other", [{"rank": 8}, {"target_modules": ("query",)}, {"target_modules": "all-linear"}])
@pytest.mark.parametrize("rank", [4, 1])  # tensors of rank 1 could be broadcast into any other rank
def test_another_adapter_is_refused(base: Path, tmp_path: Path, other: dict[str, Any], rank: int) -> None:
    folder = save(trained(base, rank=rank), base, tmp_path / "saved", rank=rank)
    with pytest.raises(CorruptObject, match=TRAINED_WEIGHTS) as caught:
        make_model(config(base, **{"rank": rank, **other}), "cpu", resume_dir=folder)
    assert "another recipe" in caught.value.hint


@pytest.mark.parametrize("targets", [("nope",), ("query", "nope"), ("LayerNorm",), ()])
def test_target_modules_that_do_not_exist_are_refused(base: Path, targets: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules") as caught:
        make_model(config(base, target_modules=targets), "cpu")
    assert caught.value.hint == "the model's linear layers are dense, key, linear, query, value"
