"""The trial that decides whether a model is packed: what it lets through, what it refuses, and what it leaves alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling, StaticEmbedding, WeightedLayerPooling
from transformers import AutoConfig, AutoModel, BertModel, PreTrainedModel

from support.tiny_families import tiny_encoder
from support.tiny_model import all_texts, tiny_stella, tiny_tokenizer
from tercet.errors import PlanError
from tercet.model import packed_attention, packed_model
from tercet.model.grouped_attention import Layout
from tercet.model.packing_trial import MAX_ERROR, choose_packing, prepare_to_encode, small_copy, try_rows
from tercet.model.row import row_batch
from tercet.planning.packing import ForwardChoice

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(family: str = "bert", pooling: str | tuple[str, ...] = "mean", include_prompt: bool = True) -> Any:
        folder = tiny_encoder(
            tmp_path_factory.mktemp(family), family, all_texts(), pooling, 0.1, include_prompt=include_prompt
        )
        return SentenceTransformer(str(folder), device="cpu")

    return make


# --- models that are not what they should be ------------------------------------------------------------------------


class DropsLayout(BertModel):
    """Does not hand the layout on to its layers, so each text would attend to all of the row."""

    def forward(self, *args: Any, layout: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return super().forward(*args, **kwargs)


class CountsOn(BertModel):
    """Counts positions over the whole row."""

    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None] % 50, **kwargs)


class CountsFromTwo(BertModel):
    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        later = None if position_ids is None else position_ids + 1
        return super().forward(input_ids, position_ids=later, **kwargs)


class SeesPadding(BertModel):
    """Ignores the mask, so padded texts attend to padding."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return super().forward(*args, attention_mask=None, **kwargs)


class AddsMeanOfBatch(BertModel):
    """Mixes texts after its layers, in training only."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.training:
            output["last_hidden_state"] = output["last_hidden_state"] + output["last_hidden_state"].mean(1, True)
        return output


class Fails(BertModel):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("this model has moods")


WRONG = {
    DropsLayout: "does not pass the layout",
    CountsOn: "differs by",
    CountsFromTwo: "differs by",
    SeesPadding: "differs by",
    AddsMeanOfBatch: "differs by",
    Fails: "in a trial on a small random copy of bert, RuntimeError: this model has moods",
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_wrong_model_is_refused(load: Any, kind: type[PreTrainedModel], pooling: str) -> None:
    model = load(pooling=pooling)
    model[0].model.__class__ = kind
    trial = try_rows(model)
    assert trial.refusal is not None
    assert WRONG[kind] in trial.refusal
    assert trial.error == 0.0 or trial.error > 10 * MAX_ERROR
    way, reason = choose_packing(model, "auto")
    # Embeddings that change with padding are not those of chunks either, whose padding is another.
    sees_padding = kind in (SeesPadding, AddsMeanOfBatch)
    assert way == ("plain" if sees_padding else "chunked")
    then = "not chunked: padding changes its embeddings, by " if sees_padding else "4 chunks of similar lengths"
    assert reason.startswith(f"not packed: {trial.refusal}; {then}")
    with pytest.raises(PlanError, match=r"workers\.packing is packed, but this model cannot be packed: "):
        choose_packing(model, "packed")


def one_text(attend: Any, query: Any, key: Any, value: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
    return attend(query, key, value, Layout([len(query)], query.device), *args, **kwargs)


def wider(attend: Any, query: Any, key: Any, value: Any, layout: Any, *args: Any, **kwargs: Any) -> Any:
    given = list(args)
    if "window" in kwargs:
        kwargs["window"] = kwargs["window"] and kwargs["window"] + 1
    else:
        given[2] = given[2] and given[2] + 1
    return attend(query, key, value, layout, *given, **kwargs)


def no_window(attend: Any, query: Any, key: Any, value: Any, layout: Any, *args: Any, **_: Any) -> Any:
    return attend(query, key, value, layout, *args[:2])


@pytest.mark.parametrize(
    ("family", "attention"), [("bert", one_text), ("modernbert", wider), ("modernbert", no_window)]
)
def test_a_wrong_attention_is_found_out(
    load: Any, monkeypatch: pytest.MonkeyPatch, family: str, attention: Any
) -> None:
    model, attend = load(family), packed_attention.attend
    assert try_rows(model).refusal is None
    monkeypatch.setattr(packed_attention, "attend", lambda *given, **named: attention(attend, *given, **named))
    trial = try_rows(model)
    assert trial.refusal is not None
    assert trial.error > 10 * MAX_ERROR


def test_a_wide_window_is_narrowed_so_that_texts_reach_beyond_it(load: Any) -> None:
    model = load("modernbert")
    model[0].model.config.local_attention = 128
    copied = small_copy(model)[0].model
    assert copied.config.local_attention == 6
    assert {layer.attention_type for layer in copied.layers} == {"full_attention", "sliding_attention"}
    assert model[0].model.config.local_attention == 128


def test_positions_that_do_not_begin_after_padding_are_found_out(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("xlm-roberta")
    assert try_rows(model).refusal is None
    monkeypatch.setattr(type(model[0]), "_infer_flatten_position_offset", lambda _: 0)
    assert try_rows(model).error > 10 * MAX_ERROR


def odd_model(load: Any, kind: str) -> Any:
    model = load()
    if kind == "CNN":
        return SentenceTransformer(modules=[model[0], CNN(32, 32, [3]), Pooling(32)], device="cpu")
    if kind == "WeightedLayerPooling":
        model[0].model.config.output_hidden_states = True
        modules = [model[0], WeightedLayerPooling(32, num_hidden_layers=3), Pooling(32)]
        return SentenceTransformer(modules=modules, device="cpu")
    return SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)], device="cpu")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("CNN", "differs by"),
        ("WeightedLayerPooling", "exists in one of both ways only"),
        ("StaticEmbedding", "its first module is StaticEmbedding, not a Transformer"),
    ],
)
def test_modules_that_take_no_rows(load: Any, kind: str, reason: str) -> None:
    way, why = choose_packing(odd_model(load, kind), "auto")
    assert way == "plain"
    assert reason in why
    assert f"its module {kind} may mix several texts" in why


def test_code_of_the_model_that_does_not_call_the_attention_interface(tmp_path: Path) -> None:
    options = {"use_memory_efficient_attention": False, "unpad_inputs": False}
    model = SentenceTransformer(
        str(tiny_stella(tmp_path / "stella")), trust_remote_code=True, config_kwargs=options, device="cpu"
    )
    assert try_rows(model).refusal == "its own code does not call the attention interface of transformers"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "the model's attention has a soft cap on the scores"),
        ("deberta-v2", "the code of deberta-v2 does not call the attention interface of transformers"),
        ("lfm2", "differs by"),  # its convolutions see the text before
        ("llama4_text", "differs by"),  # it attends within chunks of the row
    ],
)
def test_a_family_that_takes_no_rows(load: Any, family: str, reason: str) -> None:
    trial = try_rows(load(f"refused {family}"))
    assert trial.refusal is not None
    assert reason in trial.refusal


def test_rotary_positions_that_depend_on_the_longest_text_of_a_batch(load: Any) -> None:
    model = load("refused llama")
    assert try_rows(model).refusal is None  # no text is longer than 24 tokens
    model.max_seq_length = 48
    assert "rotary positions (dynamic) depend on the longest text" in str(try_rows(model).refusal)


def test_padding_on_the_left_that_shifts_positions(load: Any) -> None:
    """The plain forward pass then depends on the padding; rows have none."""
    model = load()
    model.tokenizer.padding_side = "left"
    assert try_rows(model).error > 10 * MAX_ERROR
    assert choose_packing(model, "auto")[0] == "plain"


def test_the_copy_is_whole_where_zero3_would_shard_it(load: Any) -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    model = load()
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    assert try_rows(model).refusal is None
    assert is_deepspeed_zero3_enabled()
    del settings


class CallsTheInterface(BertModel):
    """Code of a model's own, but for where it stands."""


def test_code_of_the_model_that_calls_the_attention_interface(load: Any) -> None:
    model = load()
    model[0].model.__class__ = CallsTheInterface
    assert packed_model.facts_of(model).own_code
    assert choose_packing(model, "auto")[0] == "packed"


# --- what the trial lets through, and leaves alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    "pooling", ["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", ("cls", "weightedmean")]
)
def test_every_pooling_is_let_through(load: Any, pooling: str | tuple[str, ...]) -> None:
    trial = try_rows(load(pooling=pooling))
    assert trial.refusal is None
    assert 0 < trial.error < MAX_ERROR / 10


def test_prompts_take_part(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(include_prompt=False)
    model.prompts = {"query": "bafa delo: ", "document": ""}
    assert choose_packing(model, "auto")[0] == "packed"
    monkeypatch.setattr(packed_model, "row_batch", lambda columns, _, offset: row_batch(columns, False, offset))
    assert try_rows(model).error > 10 * MAX_ERROR
    assert choose_packing(model, "auto")[0] == "plain"


def test_a_guide_is_tried_too(load: Any) -> None:
    model, guide = load(), load("electra")
    assert choose_packing(model, "auto", guide=guide)[0] == "packed"
    guide[0].model.__class__ = Fails
    way, why = choose_packing(model, "auto", guide=guide)
    assert way == "chunked"
    assert "not packed: the guide: in a trial on a small random copy of electra, RuntimeError: this" in why
    assert ForwardChoice(packing="chunked", reason=why, attention="matrices").is_due_to_guide


def test_nothing_but_the_copy_changes(load: Any) -> None:
    """Neither random state, nor the model, nor what it computes."""
    model = load("modernbert").eval()
    names = set(model[0].__dict__), set(model[0].model_forward_params or ())
    config, weights = model[0].model.config.to_json_string(), [weight.clone() for weight in model.parameters()]
    attention, expected = model[0].model.config._attn_implementation, model.encode(all_texts()[:5])
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        assert try_rows(model).refusal is None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert (set(model[0].__dict__), set(model[0].model_forward_params or ())) == names
    assert model[0].model.config.to_json_string() == config
    assert model[0].model.config._attn_implementation == attention
    assert not model.training
    for weight, old in zip(model.parameters(), weights, strict=True):
        assert weight.grad is None
        assert weight.equal(old)
    assert (model.encode(all_texts()[:5]) == expected).all()


def test_a_large_model_is_tried_on_a_small_copy() -> None:
    """24 layers of 1,024 and a vocabulary of 250,000: 560 M weights, of which the copy has 11 M."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    from tercet.model.packing_trial import small_encoder

    config = XLMRobertaConfig(vocab_size=250_002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        large = XLMRobertaModel(config)
    small = small_encoder(large)
    num_weights = sum(weight.numel() for weight in small.parameters())
    assert num_weights < 0.03 * sum(weight.numel() for weight in large.parameters())
    assert (small.config.hidden_size, small.config.num_attention_heads, len(small.encoder.layer)) == (1024, 16, 2)


@pytest.mark.parametrize(
    ("chosen", "packs"),
    [
        ("auto", True),
        ("packed", True),
        ("chunked", False),
        (ForwardChoice(packing="packed", reason="", attention="matrices"), True),
        (ForwardChoice(packing="packed", reason="one row of real tokens, no padding", attention="matrices"), True),
        (ForwardChoice(packing="chunked", reason="not packed: untested", attention="matrices"), False),
        (ForwardChoice(packing="chunked", reason="not packed: the guide: no", attention="matrices"), True),
    ],
)
def test_an_evaluation_encodes_as_the_run_chose(load: Any, chosen: Any, packs: bool) -> None:
    model = load()
    prepare_to_encode(model, chosen)
    assert model[0].can_flatten_inputs == packs


def test_an_evaluation_does_without_rows_where_this_machine_cannot(load: Any) -> None:
    model = load()
    model[0].model.__class__ = Fails
    prepare_to_encode(model, "packed")
    assert not model[0].can_flatten_inputs


@pytest.mark.parametrize(("family", "packing"), [("convbert", "plain"), ("deberta-v2", "chunked")])
def test_a_model_that_sees_padding_is_not_chunked(tmp_path: Path, family: str, packing: str) -> None:
    """Chunks have less padding than whole columns, so the loss would be another one."""
    tokenizer = tiny_tokenizer(all_texts())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    own = {"embedding_size": 32} if family == "convbert" else {}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **own)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32)], device="cpu")
    chosen, why = choose_packing(model, "auto")
    assert chosen == packing
    assert ("padding changes its embeddings" in why) == (packing == "plain")
