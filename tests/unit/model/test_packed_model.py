"""Packed or in chunks, embeddings, loss and all gradients equal those of sentence-transformers' own forward pass."""

from __future__ import annotations

import copy
import inspect
import itertools
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.packed_runs import LENGTHS, Run, assert_equal, columns, config, run
from support.tiny_families import FAMILIES, MAX_LENGTH, tiny_encoder
from support.tiny_model import all_texts, tiny_bert, tiny_stella
from tercet.config.sections import LoraConfig
from tercet.model import packed_attention, packed_model
from tercet.model.lora import add_adapter
from tercet.model.packed_model import prepare
from tercet.model.packing_trial import choose_packing

WAYS = ("packed", "chunked")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a new model of a family, in training mode."""

    @cache
    def folder(family: str, pooling: str, dropout: float, include_prompt: bool) -> Path:
        path = tmp_path_factory.mktemp("family")
        return tiny_encoder(path, family, all_texts(), pooling, dropout, include_prompt)

    def make(family: str = "bert", pooling: str = "mean", dropout: float = 0.0, include_prompt: bool = True) -> Any:
        return SentenceTransformer(str(folder(family, pooling, dropout, include_prompt)), device="cpu").train()

    return make


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_gives_what_each_column_gives(load: Any, family: str, lengths: str) -> None:
    texts = columns(LENGTHS[lengths])
    assert_equal(run(load(family), texts, "packed"), run(load(family), texts, "plain"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_with_long_texts(load: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They use torch's attention for each group of texts, except in MPNet, which adds a bias."""
    kernel, calls = packed_attention.attend_by_kernel, []
    monkeypatch.setattr(packed_attention, "LONG_TEXT", MAX_LENGTH)
    monkeypatch.setattr(packed_attention, "attend_by_kernel", lambda *a: [calls.append(a), kernel(*a)][1])
    texts = columns([*LENGTHS["edges"][:2], [MAX_LENGTH, 5, 3]])
    assert_equal(run(load(family), texts, "packed"), run(load(family), texts, "plain"))
    assert {len(call[0]) for call in calls} == (set() if family == "mpnet" else {3 * MAX_LENGTH})
    calls.clear()
    run(load(family), columns(LENGTHS["alike"]), "packed")
    assert not calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens", ("cls", "mean")])
def test_pooling(load: Any, pooling: str, way: str) -> None:
    texts = columns(LENGTHS["mixed"])
    assert_equal(run(load(pooling=pooling), texts, way), run(load(pooling=pooling), texts, "plain"))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", [*FAMILIES, "electra"])
def test_chunks(load: Any, family: str, lengths: str) -> None:
    """Works for a family that is not packed, too."""
    texts = columns(LENGTHS[lengths])
    assert_equal(run(load(family), texts, "chunked"), run(load(family), texts, "plain"))


MATRYOSHKA = {"dims": [24, 12, 6]}
RANKING = {"scale": 2.0}
CACHED = {"mini_batch_size": 4}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "triplet": ("TripletLoss", {"distance_metric": "cosine", "triplet_margin": 0.5}),
    "ranking": ("MultipleNegativesRankingLoss", RANKING),
    "symmetric": ("MultipleNegativesSymmetricRankingLoss", RANKING),
    "mega batch": ("MegaBatchMarginLoss", {"use_mini_batched_version": False, "mini_batch_size": 2}),
    "gist": ("GISTEmbedLoss", {"temperature": 0.5}),
    "angle": ("AnglELoss", RANKING),
    "matryoshka": ("MultipleNegativesRankingLoss", {**RANKING, "matryoshka": MATRYOSHKA}),
    "matryoshka gist": ("GISTEmbedLoss", {"temperature": 0.5, "matryoshka": MATRYOSHKA}),
    "cached ranking": ("CachedMultipleNegativesRankingLoss", {**RANKING, **CACHED}),
    "cached by tokens": ("CachedMultipleNegativesRankingLoss", {**RANKING, "mini_batch_num_tokens": 30}),
    "cached symmetric": ("CachedMultipleNegativesSymmetricRankingLoss", {**RANKING, **CACHED}),
    "cached mega batch": ("MegaBatchMarginLoss", CACHED),
    "cached gist": ("CachedGISTEmbedLoss", {"temperature": 0.5, **CACHED}),
    "cached matryoshka": ("CachedMultipleNegativesRankingLoss", {**RANKING, **CACHED, "matryoshka": MATRYOSHKA}),
}


def of_loss(load: Any, name: str, way: str, guide: SentenceTransformer | None) -> Run:
    loss = config(LOSSES[name][0], **LOSSES[name][1])
    texts = columns(LENGTHS["mixed"])[: 2 if "mega" in name else 3]
    return run(load(), texts, way, loss, (None,) * len(texts), guide)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_a_row(load: Any, name: str) -> None:
    guides = [load("bert", "cls").eval().requires_grad_(False) if "gist" in name else None for _ in WAYS]
    assert_equal(of_loss(load, name, "packed", guides[0]), of_loss(load, name, "plain", guides[1]))


@pytest.mark.parametrize("name", [name for name in LOSSES if "cached" not in name])
def test_every_loss_in_chunks(load: Any, name: str) -> None:
    guide = load("electra", "cls").eval().requires_grad_(False) if "gist" in name else None
    assert_equal(of_loss(load, name, "chunked", guide), of_loss(load, name, "plain", guide))


def test_a_guide_that_reads_other_words(load: Any, tmp_path: Path) -> None:
    """It decodes the texts from the row and tokenizes them again, whether it is packed or not."""
    other = tiny_bert(tmp_path / "guide", [*all_texts(), "another"])
    guides = [SentenceTransformer(str(other), device="cpu").requires_grad_(False).eval() for _ in WAYS]
    for name in ("gist", "cached gist"):
        assert_equal(of_loss(load, name, "packed", guides[0]), of_loss(load, name, "plain", guides[1]))


@pytest.mark.parametrize(("family", "other"), [("bert", "xlm-roberta"), ("xlm-roberta", "bert"), ("bert", "mpnet")])
@pytest.mark.parametrize("name", ["gist", "cached gist"])
def test_a_guide_that_counts_positions_from_another_number(load: Any, family: str, other: str, name: str) -> None:
    """It has the same vocabulary, and so gets the same features."""
    texts, loss = columns(LENGTHS["mixed"]), config(LOSSES[name][0], **LOSSES[name][1])
    guides = [load(other, "cls").eval().requires_grad_(False) for _ in WAYS]
    found, expected = (
        run(load(family), texts, way, loss, guide=guide) for way, guide in zip(("packed", "plain"), guides, strict=True)
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("prompts", [("bafa delo: ", "lura: ", "lura: "), ("lura: ", None, None), ("lura: ",) * 3])
def test_prompts(load: Any, pooling: str, include_prompt: bool, prompts: tuple[str | None, ...]) -> None:
    """Each column has a prompt of another length; the pooling skips them if the model says so."""
    texts = columns(LENGTHS["mixed"])
    made = [load("bert", pooling, 0.0, include_prompt) for _ in range(3)]
    plain = run(made[0], texts, "plain", prompts=prompts)
    assert_equal(run(made[1], texts, "packed", prompts=prompts), plain)
    if include_prompt:
        assert_equal(run(made[2], texts, "chunked", prompts=prompts), plain)
        assert float((plain[0][0] - run(load("bert", pooling), texts, "plain")[0][0]).abs().max()) > 1e-3
    else:
        assert choose_packing(made[2], "chunked")[0] == "plain"


def test_prompts_in_a_cached_loss(load: Any) -> None:
    texts, prompts = columns(LENGTHS["mixed"]), ("bafa delo: ", "lura: ", "lura: ")
    loss = config("CachedMultipleNegativesRankingLoss", **RANKING, **CACHED)
    found, expected = (run(load("bert", "mean", 0.0, False), texts, way, loss, prompts) for way in ("packed", "plain"))
    assert_equal(found, expected)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_adapter(load: Any, family: str) -> None:
    names = ("query", "value") if family == "bert" else ("q", "v")

    def adapted() -> SentenceTransformer:
        model = load(family)
        torch.manual_seed(3)
        add_adapter(model, LoraConfig(rank=4, target_modules=names))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        return model

    texts = columns(LENGTHS["mixed"])
    found = run(adapted(), texts, "packed")
    assert_equal(found, run(adapted(), texts, "plain"))
    assert any("lora_A" in name for name in found[2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mpnet"])
def test_gradient_checkpointing_with_dropout(load: Any, family: str, way: str) -> None:
    """The recomputed forward pass has the same layout and the same dropout masks."""

    def dropped(recomputes: bool) -> Run:
        model = load(family, "mean", 0.3)
        if recomputes:
            model[0].model.activation_checkpointing_enable({"use_reentrant": False})
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        torch.manual_seed(5)
        return run(model, columns(LENGTHS["mixed"]), way)

    first, again, recomputed = dropped(False), dropped(False), dropped(True)
    assert first[1] == again[1] == recomputed[1]
    for name, gradient in first[2].items():
        assert torch.equal(gradient, again[2][name])
        assert float((gradient - recomputed[2][name]).abs().max()) < 1e-5
    assert first[1] != run(load(family), columns(LENGTHS["mixed"]), way)[1]


def test_dropout_of_attention() -> None:
    """The average equals attention without dropout; gradients are those of the drawn masks."""
    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import attend

    torch.manual_seed(0)
    layout = Layout([2, 3, 3, 9], torch.device("cpu"))
    rows = [torch.randn(17, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    plain = attend(*rows, layout, 0.3)
    drawn = torch.stack([attend(*rows, layout, 0.3, dropout=0.2).detach() for _ in range(2000)])
    assert (drawn.mean(dim=0) - plain).abs().max().item() < 0.1
    assert drawn.std(dim=0).min().item() > 0.01

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attend(*inputs, layout, 0.3, dropout=0.2)

    assert torch.autograd.gradcheck(seeded, tuple(rows))


def long_rows(by_kernel: bool, window: int | None, dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    """Return the output of attention over a row with long texts and the gradients of query, key and value; and how many
    bytes are kept for the backward pass."""
    from tercet.model.grouped_attention import GroupedAttention, Layout, Reach, attend_by_kernel

    reach = Reach() if window is None else Reach(window - 1, window - 1)
    lengths, draw, kept = [1, 4, 5, 40, 512], torch.Generator().manual_seed(0), {}
    layout = Layout(lengths, torch.device("cpu"))
    rows = [torch.randn(sum(lengths), 2, 8, generator=draw).to(dtype).requires_grad_() for _ in range(3)]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if by_kernel:
            output = attend_by_kernel(*rows, layout, 0.3, reach, 0.0)
        else:
            output = GroupedAttention.apply(*rows, None, layout, 0.3, 0.0, reach)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), rows)], sum(kept.values())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("window", [None, 3, 300])
def test_long_texts_by_torchs_attention(window: int | None, dtype: torch.dtype, error: float) -> None:
    """Equals the matrices up to rounding, and keeps nothing that grows with the square of the length."""
    (found, num_bytes), (expected, of_matrices) = (long_rows(way, window, dtype) for way in (True, False))
    for left, right in zip(found, expected, strict=True):
        assert float((left - right).abs().max()) <= error * float(right.abs().max())
    assert of_matrices > 2 * 512 * 512 * dtype.itemsize
    assert window is not None or num_bytes < of_matrices / 4


def by_bounds_stand_in(calls: list[int], ahead: int = 0) -> Any:
    """Return a stand-in with the signature of torch's attention for rows of texts.

    ahead: how many tokens of the next text a text attends to, by mistake."""
    from torch.nn.attention.varlen import varlen_attn

    def stand_in(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(varlen_attn).bind(query, key, value, *args, **kwargs).arguments
        assert given["cu_seq_q"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == max(given["cu_seq_k"].diff().tolist())
        calls.append(len(given["cu_seq_q"]))
        parts = []
        for start, stop in itertools.pairwise(given["cu_seq_q"].tolist()):
            q = query[start:stop].transpose(0, 1)
            k, v = (x[start : stop + ahead].transpose(0, 1) for x in (key, value))
            places = [torch.arange(x.shape[1]) for x in (q, k)]
            left, right = given["window_size"]
            far = places[1] - places[0][:, None]
            mask = ((far <= right) | (right < 0)) & ((far >= -left) | (left < 0))
            scores = torch.nn.functional.scaled_dot_product_attention
            parts.append(scores(q, k, v, attn_mask=mask, scale=given["scale"]).transpose(0, 1))
        return torch.cat(parts)

    return stand_in


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that sets a stand-in for attention by bounds, and lets it be used on this machine."""
    from tercet.model import packed_attention

    def use(stand_in: Any) -> None:
        monkeypatch.setattr(packed_attention, "varlen_attn", stand_in)
        monkeypatch.setattr(packed_attention, "_knows_bounds", lambda *_: True)

    packed_attention.bounds_obstacle.cache_clear()
    yield use
    packed_attention.bounds_obstacle.cache_clear()


def test_attention_that_knows_bounds(as_on_a_gpu: Any) -> None:
    """With a stand-in for a GPU in 16 bits, the result equals that of groups."""
    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import attend

    calls: list[int] = []
    layout = Layout([1, 2, 2, 5, 17], torch.device("cpu"))
    torch.manual_seed(0)
    rows = [torch.randn(27, 4, 8) for _ in range(3)]
    grouped = [attend(*rows, layout, 0.4, window=window) for window in (None, 4)]
    as_on_a_gpu(by_bounds_stand_in(calls))
    for expected, window in zip(grouped, (None, 4), strict=True):
        assert float((attend(*rows, layout, 0.4, window=window) - expected).abs().max()) < 1e-6
    assert calls == [6, 6, 6, 6]  # tried once, with and without a window


@pytest.mark.parametrize("wrong", ["raises", "sees the next text"])
def test_a_kernel_that_is_wrong_on_this_machine_is_not_used(
    as_on_a_gpu: Any, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the first evaluation, which is in inference mode, nor in training."""
    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import attend

    def raises(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nat line 1")

    layout = Layout([1, 2, 2, 5, 17], torch.device("cpu"))
    torch.manual_seed(0)
    rows = [torch.randn(27, 4, 8, requires_grad=True) for _ in range(3)]
    expected = attend(*rows, layout, 0.4)
    as_on_a_gpu(raises if wrong == "raises" else by_bounds_stand_in([], ahead=1))
    with torch.inference_mode():
        assert attend(*rows, layout, 0.4).equal(expected)
    attend(*rows, layout, 0.4).sum().backward()
    assert rows[0].grad is not None
    (record,) = caplog.records
    why = "only supports Ampere" if wrong == "raises" else "its output is off by"
    assert why in record.getMessage()


def test_the_trial_of_a_kernel_within_a_recomputed_layer(as_on_a_gpu: Any) -> None:
    """The first step of a resumed run has no evaluation before it."""
    from torch.utils.checkpoint import checkpoint

    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import attend

    as_on_a_gpu(by_bounds_stand_in([]))
    layout = Layout([1, 2, 2, 5, 17], torch.device("cpu"))
    rows = [torch.randn(27, 4, 8, requires_grad=True) for _ in range(3)]
    checkpoint(lambda *given: attend(*given, layout, 0.4), *rows, use_reentrant=False).sum().backward()
    assert all(row.grad is not None for row in rows)


def test_when_attention_by_bounds_is_used() -> None:
    from tercet.model.grouped_attention import Reach
    from tercet.model.packed_attention import _knows_bounds

    def row(is_cuda: bool = True, dtype: torch.dtype = torch.bfloat16, num_heads: int = 4) -> Any:
        return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(9, num_heads, 8))

    everything = Reach()
    assert _knows_bounds(row(), row(), 0.0, None, everything)
    assert _knows_bounds(row(), row(), 0.0, None, Reach(3, 3))
    assert not _knows_bounds(row(), row(), 0.1, None, everything)
    assert not _knows_bounds(row(), row(), 0.0, torch.zeros(1), everything)
    assert not _knows_bounds(row(), row(), 0.0, None, Reach(None, 0))
    assert not _knows_bounds(row(), row(num_heads=2), 0.0, None, everything)
    for other in (row(dtype=torch.float32), row(is_cuda=False)):
        assert not _knows_bounds(other, other, 0.0, None, everything)


@pytest.mark.parametrize("attention", ["bounds", "matrices"])
def test_a_kernel_that_the_run_chose_is_not_tried_again(as_on_a_gpu: Any, attention: Any) -> None:
    from tercet.model.grouped_attention import Layout
    from tercet.model.packed_attention import attend

    calls: list[int] = []
    as_on_a_gpu(by_bounds_stand_in(calls))
    rows = [torch.randn(27, 4, 8) for _ in range(3)]
    attend(*rows, Layout([1, 2, 2, 5, 17], torch.device("cpu"), attention), 0.4)
    assert calls == ([6] if attention == "bounds" else [])


def test_a_trial_that_runs_out_of_memory_decides_nothing(as_on_a_gpu: Any) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    as_on_a_gpu(fails)
    arguments = (torch.device("cpu"), torch.float32, 8)
    with pytest.raises(torch.OutOfMemoryError):
        packed_attention.bounds_obstacle(*arguments)
    as_on_a_gpu(by_bounds_stand_in([]))
    assert packed_attention.bounds_obstacle(*arguments) is None


def test_why_a_model_does_not_use_the_kernel(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(packed_model, "bounds_obstacle", lambda *given: tried.append(given))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    model = load()
    assert "here is cpu with bfloat16" in packed_model.kernel_obstacle(model, cpu, torch.bfloat16)
    assert "here is cuda with float32" in packed_model.kernel_obstacle(model, gpu, torch.float32)
    assert "position bias" in packed_model.kernel_obstacle(load("mpnet"), gpu, torch.bfloat16)
    assert tried == []
    assert packed_model.kernel_obstacle(model, gpu, torch.bfloat16) is None
    config = model[0].model.config
    assert tried == [(gpu, torch.bfloat16, config.hidden_size // config.num_attention_heads)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits(load: Any, family: str, way: str) -> None:
    """Under autocast, results are as close to fp32 as those of the plain forward pass."""
    texts = columns(LENGTHS["mixed"])
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (run(load(family), texts, each) for each in (way, "plain"))
    exact = run(load(family), texts, "plain")
    error, usual = (abs(each[1] - exact[1]) for each in (found, plain))
    assert error < max(3 * usual, 0.02)
    assert found[2].keys() == exact[2].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_encoding(load: Any, family: str) -> None:
    """`encode` packs its batches too. Padded features still work, and so does a copy with its own weights."""
    texts = [text for column in columns(LENGTHS["mixed"]) + columns(LENGTHS["edges"]) for text in column]
    model = load(family).eval()
    expected = model.encode(texts, batch_size=5)
    padded = model.preprocess(texts)
    prepare(model, "packed")
    assert abs(model.encode(texts, batch_size=5) - expected).max() < 2e-6
    with torch.no_grad():
        found = model(padded)["sentence_embedding"].numpy()
    assert abs(found - expected).max() < 2e-6
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert abs(copied.encode(texts) - expected).max() < 2e-6


def test_packing_changes_no_file_of_a_saved_model(load: Any, tmp_path: Path) -> None:
    for way in ("packed", "plain"):
        model = load()
        prepare(model, way)
        model.save_pretrained(str(tmp_path / way), create_model_card=False)
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "packed") for path in (tmp_path / "packed").rglob("*") if path.is_file()
    }
    for path in files:
        assert (tmp_path / "packed" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes(), path


def test_a_model_with_its_own_code_runs_in_chunks(tmp_path: Path) -> None:
    folder = tiny_stella(tmp_path / "stella")
    switched_off = {"use_memory_efficient_attention": False, "unpad_inputs": False}

    def stella() -> SentenceTransformer:
        options: dict[str, Any] = {"trust_remote_code": True, "config_kwargs": switched_off, "device": "cpu"}
        return SentenceTransformer(str(folder), **options).train()

    way, reason = choose_packing(stella(), "auto")
    assert (way, "its own code does not call the attention interface" in reason) == ("chunked", True)
    texts = columns([[3, 1, 7, 5], [12, 4, 2, 8], [6, 6, 2, 20]])
    assert_equal(run(stella(), texts, "chunked"), run(stella(), texts, "plain"))
