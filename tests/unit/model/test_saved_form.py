"""A model that changes when it is saved and loaded again is found before the first step; checkpoints are complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from support.tiny_families import FAMILIES, tiny_encoder
from support.tiny_model import all_texts, tiny_bert, tiny_stella
from tercet.config.sections import LoraConfig, ModelConfig
from tercet.errors import ConfigError, CorruptObject
from tercet.model import saved_form
from tercet.model.encoder import make_model, save
from tercet.model.saved_form import SavedForm, check_saved, prove_saving, read_form

OTHER_FORM = ("gte", "nomic_bert", "jina_embeddings_v3")
SWITCHED_OFF = {"use_memory_efficient_attention": False, "unpad_inputs": False}
ADAPTER = LoraConfig(rank=4, alpha=8.0, target_modules="all-linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("saved-form") / "base", all_texts(), dense_features=8)


def prove(folder: Path, **values: Any) -> SavedForm:
    config = ModelConfig(name_or_path=str(folder), **values)
    return prove_saving(config, make_model(config, "cpu"))


# --- the trial ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, None) for family in (*FAMILIES, *OTHER_FORM)), ("gte", ADAPTER)]
)
def test_every_family_passes(tmp_path: Path, family: str, lora: LoraConfig | None) -> None:
    """Also those whose files have other tensors than their modules."""
    config = ModelConfig(name_or_path=str(tiny_encoder(tmp_path, family, all_texts())), lora=lora)
    model = make_model(config, "cpu")
    form = prove_saving(config, model)
    assert (len(form.forms), form.num_layers) == (1, None)
    weights = {name.removeprefix("0.model.") for name, _ in model.named_parameters()}
    others = {name for name in form.forms[0] if "/" not in name} - weights
    assert bool(others) == (family in OTHER_FORM)
    save(config, model, tmp_path / "saved")
    check_saved(tmp_path / "saved", form)


@pytest.mark.parametrize("family", ["modernbert", "gte", "distilbert"])
def test_without_room_for_a_copy_the_layers_are_tried_on_a_smaller_one(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_form, "_has_room", lambda *_: False)
    config = ModelConfig(name_or_path=str(tiny_encoder(tmp_path, family, all_texts())))
    model = make_model(config, "cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    form = prove_saving(config, model)
    assert form.num_layers == saved_form.SMALL_NUM_LAYERS < model.transformers_model.config.num_hidden_layers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save(config, model, tmp_path / "saved")
    check_saved(tmp_path / "saved", form)
    drop_tensor(
        tmp_path / "saved" / "model.safetensors",
        "embeddings.word_embeddings.weight",
        "embeddings.tok_embeddings.weight",
    )
    with pytest.raises(CorruptObject, match=r"embeddings\.weight is missing"):
        check_saved(tmp_path / "saved", form)


def drop_tensor(path: Path, *names: str) -> None:
    save_file({name: value for name, value in load_file(path).items() if name not in names}, path)


def test_a_model_with_code_of_its_own_passes(tmp_path: Path) -> None:
    form = prove(tiny_stella(tmp_path / "model"), trust_remote_code=True, config_kwargs=SWITCHED_OFF)
    assert form.forms[0]["2_Dense/linear.weight"].shape == (1024, 32)


def test_neither_the_model_nor_the_random_state_changes(base: Path) -> None:
    config = ModelConfig(name_or_path=str(base))
    model = make_model(config, "cpu")
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    prove_saving(config, model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LAYER = "encoder.layer.0.attention.self"
NORM = "encoder.layer.0.output.LayerNorm"


def swap(state: dict[str, torch.Tensor], left: str, right: str) -> None:
    state[left], state[right] = state[right], state[left]


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "drops a matrix": (lambda state: state.pop(f"{LAYER}.query.weight"), f"{LAYER}.query.weight has other values"),
    # Equal to what it is initialised with, as long as nothing is trained.
    "drops a norm": (lambda state: state.pop(f"{NORM}.weight"), f"{NORM}.weight has other values"),
    "drops a bias": (lambda state: state.pop(f"{NORM}.bias"), f"{NORM}.bias has other values"),
    "swaps matrices": (
        lambda state: swap(state, f"{LAYER}.query.weight", f"{LAYER}.key.weight"),
        f"{LAYER}.query.weight has other values.*{LAYER}.key.weight has other values",
    ),
    "swaps biases": (
        lambda state: swap(state, f"{LAYER}.query.bias", f"{LAYER}.key.bias"),
        f"{LAYER}.query.bias has other values",
    ),
    "transposes": (
        lambda state: state.update({f"{LAYER}.query.weight": state[f"{LAYER}.query.weight"].T.contiguous()}),
        f"{LAYER}.query.weight has other values",
    ),
    "permutes rows": (
        lambda state: state.update({f"{LAYER}.value.weight": state[f"{LAYER}.value.weight"].flip(0)}),
        f"{LAYER}.value.weight has other values",
    ),
    "rounds": (
        lambda state: state.update({name: value.half() for name, value in state.items()}),
        "has other values.*and [0-9]+ more",
    ),
}


@pytest.mark.parametrize(("fault", "lora"), [*((fault, None) for fault in FAULTS), ("swaps matrices", ADAPTER)])
def test_a_model_that_saves_wrongly_is_found(
    base: Path, fault: str, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_state, message = FAULTS[fault]
    original = PreTrainedModel.save_pretrained

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        state = dict(self.state_dict())
        break_state(state)
        original(self, *args, **{**kwargs, "state_dict": state})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    with pytest.raises(ConfigError, match=f"changes when it is saved and loaded again.*{message}"):
        prove(base, lora=lora)


def test_a_dense_layer_that_is_not_saved_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers.base.modules import Dense

    original = Dense.save

    def save_without_bias(self: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        original(self, folder, *args, **kwargs)
        drop_tensor(Path(folder) / "model.safetensors", "linear.bias")

    monkeypatch.setattr(Dense, "save", save_without_bias)
    with pytest.raises(ConfigError, match=r"cannot be loaded after it was saved: RuntimeError: .* for Dense"):
        prove(base)


def test_an_adapter_that_is_not_saved_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tercet.model import lora as module

    original = module.save_file

    def save_file_without_one(tensors: dict[str, torch.Tensor], path: Path) -> None:
        original(dict(sorted(tensors.items())[1:]), path)

    monkeypatch.setattr(module, "save_file", save_file_without_one)
    with pytest.raises(ConfigError, match=r"lora_A\.default\.weight is missing"):
        prove(base, lora=ADAPTER)


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_buffer_that_is_not_saved_is_found(tmp_path: Path, is_saved: bool) -> None:
    folder = tiny_stella(tmp_path / f"scale_{is_saved}")  # transformers knows code by the name of its folder
    code = folder / "modeling.py"
    buffer = '        self.register_buffer("scale", torch.ones(3), persistent=True)\n        self.post_init()\n'
    text = code.read_text().replace("        self.post_init()\n", buffer)
    if not is_saved:
        ignored = '    base_model_prefix = "new"\n    _keys_to_ignore_on_save = ["scale"]\n'
        text = text.replace('    base_model_prefix = "new"\n', ignored)
    code.write_text(text)
    if is_saved:
        prove(folder, trust_remote_code=True, config_kwargs=SWITCHED_OFF)
    else:
        with pytest.raises(ConfigError, match=r"0\.model\.scale has other values"):
            prove(folder, trust_remote_code=True, config_kwargs=SWITCHED_OFF)


def test_a_weight_that_is_no_longer_shared_is_found(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal after loading, but each would be trained separately."""
    original = saved_form.load_model

    def load_shared(*args: Any) -> SentenceTransformer:
        model = original(*args)
        first, second = (layer.output.LayerNorm for layer in model.transformers_model.encoder.layer)
        second.weight = first.weight
        return model

    monkeypatch.setattr("tercet.model.saved_form.load_model", load_shared)
    monkeypatch.setattr("tercet.model.saved_form._sha256", lambda _: "equal")
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.LayerNorm\.weight is shared with another module"):
        prove(base)


def test_a_model_that_cannot_be_saved_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_pretrained(*_: Any, **__: Any) -> None:
        raise RuntimeError("some tensors share memory\nand more")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    with pytest.raises(ConfigError, match=r"the model cannot be saved: RuntimeError: some tensors share memory$"):
        prove(base)


def test_a_full_disk_is_not_the_models_fault(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_pretrained(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="No space left"):
        prove(base)


# --- each checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def form(base: Path) -> SavedForm:
    return prove(base)


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    SentenceTransformer(str(base), device="cpu").save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_complete_model(saved: Path, form: SavedForm) -> None:
    check_saved(saved, form)


def test_a_model_in_several_files(saved: Path, form: SavedForm) -> None:
    tensors = sorted(load_file(saved / "model.safetensors").items())
    (saved / "model.safetensors").unlink()
    for number in range(3):
        save_file(dict(tensors[number::3]), saved / f"model-{number + 1:05d}-of-00003.safetensors")
    check_saved(saved, form)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("linear.bias"), "2_Dense/linear.bias is missing"),
        (lambda tensors: tensors.update({"linear.bias": torch.zeros(0)}), r"linear.bias is F32 of shape \(0,\)"),
        (lambda tensors: tensors.update({"linear.weight": torch.zeros(4, 32)}), r"linear.weight is F32 of shape \(4,"),
        (lambda tensors: tensors.update({"linear.bias": torch.zeros(8).half()}), "linear.bias is F16 of shape"),
        (lambda tensors: tensors.update({"more": torch.zeros(0)}), "2_Dense/more is unexpected"),
    ],
)
def test_an_incomplete_model(
    saved: Path, form: SavedForm, change: Callable[[dict[str, torch.Tensor]], Any], problem: str
) -> None:
    path = saved / "2_Dense" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CorruptObject, match=f"the saved model is not complete: .*{problem}"):
        check_saved(saved, form)


def test_a_folder_without_weights(saved: Path, form: SavedForm) -> None:
    for path in saved.rglob("model.safetensors"):
        path.unlink()
    with pytest.raises(CorruptObject, match=r"is missing.*; and [0-9]+ more"):
        check_saved(saved, form)


def test_a_model_that_a_resumed_run_saves_in_another_form(saved: Path, form: SavedForm) -> None:
    other = {f"model.{name}": tensor for name, tensor in form.forms[0].items()}
    check_saved(saved, form.model_copy(update={"forms": (other, *form.forms)}))
    shutil.rmtree(saved / "2_Dense")
    with pytest.raises(CorruptObject, match=r"2_Dense/linear\.bias is missing"):
        check_saved(saved, form.model_copy(update={"forms": (other, *form.forms)}))
    assert read_form(saved).keys() < form.forms[0].keys()
