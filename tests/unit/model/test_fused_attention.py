"""Whether torch's kernels for rows of texts are used is decided by a trial, with right and wrong stand-ins for them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BertConfig, ModernBertConfig, Qwen2Config

from support.tiny_families import tiny_encoder
from support.tiny_model import all_texts
from tercet.model import fused_attention as module
from tercet.model import packed_model
from tercet.model.fused_attention import Case, cases_of, fused_attention, fused_obstacle, trial_obstacle
from tercet.model.grouped_attention import Layout, Reach
from tercet.model.packed_attention import attend

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASES = [Case(8, *options) for options in itertools.product([1, 3], [False, True], [False, True], [False, True])]


class _OtherMask(torch.autograd.Function):
    """A product of weights and values whose backward pass drops other weights."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        ctx.save_for_backward(weights, value)
        ctx.dropout = dropout
        return torch.dropout(weights, dropout, True) @ value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        weights, value = ctx.saved_tensors
        other = torch.dropout(torch.ones_like(weights), ctx.dropout, True)
        return (gradient @ value.mT) * other, (weights * other).mT @ gradient, None


def kernel(mistake: str = "") -> Any:
    """Return a stand-in for torch's kernels: each text alone. mistake: what is wrong with it."""

    def attention(query: Any, key: Any, value: Any, layout: Layout, scaling: float, reach: Any, dropout: float) -> Any:
        repeats = query.shape[1] // key.shape[1]
        if mistake == "takes the wrong keys":
            key, value = (x.repeat(1, repeats, 1) for x in (key, value))
        else:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        outputs, start = [], 0
        for length, texts in itertools.groupby(layout.cu_seq_lens.diff().tolist()):
            first = start + torch.arange(len(list(texts)))[:, None] * length
            start += len(first) * length
            num_keys = length + (mistake == "sees the next text" and start < len(key))
            q = query[first + torch.arange(length)].transpose(1, 2)
            k, v = (x[first + torch.arange(num_keys)].transpose(1, 2) for x in (key, value))
            ahead = torch.arange(num_keys) - torch.arange(length)[:, None]
            before, after = (None if mistake == "sees everything" else limit for limit in reach)
            if mistake == "has a window of one more":
                before = None if before is None else before + 1
            hidden = torch.zeros_like(ahead, dtype=torch.bool)
            if before is not None:
                hidden |= ahead < -before
            if after is not None:
                hidden |= ahead > after
            scores = (q @ k.mT * scaling).masked_fill(hidden, -torch.inf)
            outputs.append(_drop(scores.softmax(dim=-1), v, dropout).transpose(1, 2).flatten(0, 1))
        output = torch.cat(outputs)
        return output.detach() + 0 * output if mistake == "has no gradient" else output

    def _drop(weights: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
        if not dropout or mistake == "drops nothing":
            return weights @ value
        if mistake == "drops other weights backward":
            dropped: torch.Tensor = _OtherMask.apply(weights, value, dropout)
            return dropped
        if mistake == "does not scale what it keeps":
            return torch.dropout(weights, dropout, True) * (1 - dropout) @ value
        if mistake == "drops too many":
            return torch.dropout(weights, 2 * dropout, True) @ value
        return torch.dropout(weights, dropout, True) @ value

    return attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_that_is_right_passes_the_trial(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert trial_obstacle(kernel(), CPU, dtype, case) is None
    assert torch.get_rng_state().equal(state)  # the run's dropout is what it would be without a trial


WRONG = [
    ("sees the next text", Case(8), "output"),
    ("sees everything", Case(8, is_causal=True), "output"),
    ("sees everything", Case(8, is_windowed=True), "output"),
    ("sees everything", Case(8, is_windowed=True, has_dropout=True), "output"),
    ("has a window of one more", Case(8, is_causal=True, is_windowed=True), "output"),
    ("takes the wrong keys", Case(8, queries_per_key=3), "output"),
    ("has no gradient", Case(8), "gradient"),
    ("drops nothing", Case(8, has_dropout=True), "drops 0%"),
    ("drops too many", Case(8, has_dropout=True), "instead of 10%"),
    ("does not scale what it keeps", Case(8, has_dropout=True), "times what it should be"),
    ("drops other weights backward", Case(8, has_dropout=True), "backward pass drops other"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mistake", "case", "why"), WRONG)
def test_a_kernel_that_is_wrong_does_not(mistake: str, case: Case, why: str, dtype: torch.dtype) -> None:
    found = trial_obstacle(kernel(mistake), CPU, dtype, case)
    assert found is not None
    assert re.search(why, found)


def test_an_error_of_the_kernel_is_the_reason() -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nat line 1")

    assert trial_obstacle(fails, CPU, torch.bfloat16, Case(8)) == "FlashAttention only supports Ampere GPUs or newer."


TRANSIENT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", TRANSIENT)
def test_an_error_that_says_nothing_about_the_kernel_is_raised_and_forgotten(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "_try", fails)
    on_gpu: Any = torch.device("cuda", 0)
    monkeypatch.setattr(module, "_generators", lambda _: [])
    fused_obstacle.cache_clear()
    with pytest.raises(type(error)):
        fused_obstacle(on_gpu, torch.bfloat16, Case(8))
    monkeypatch.setattr(module, "_try", lambda *_: None)
    assert fused_obstacle(on_gpu, torch.bfloat16, Case(8)) is None
    fused_obstacle.cache_clear()


def test_where_the_kernels_cannot_be_tried() -> None:
    assert "needs a GPU" in str(fused_obstacle(CPU, torch.bfloat16, Case(8)))
    on_gpu = torch.device("cuda", 0)
    assert "16 or 32 bits" in str(fused_obstacle(on_gpu, torch.float64, Case(8)))
    assert "window on both sides" in str(fused_obstacle(on_gpu, torch.float32, Case(8, is_windowed=True)))


def meta_rows(dtype: torch.dtype, num_key_heads: int = 4) -> list[torch.Tensor]:
    shapes = [(12, 4, 8), (12, num_key_heads, 8), (12, num_key_heads, 8)]
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes]


def meta_layout(attention: Any) -> Layout:
    return Layout([3, 9], torch.device("meta"), attention, torch.empty(3, dtype=torch.int32, device="meta"))


@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("reach", [Reach(), Reach(None, 0), Reach(3, 3), Reach(3, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_takes_these_arguments(dtype: torch.dtype, reach: Reach, num_key_heads: int) -> None:
    """On the meta device, where nothing is computed. The backward pass of 32 bits has no such implementation."""
    rows = meta_rows(dtype, num_key_heads)
    output = fused_attention(*rows, meta_layout("fused"), 0.3, reach, 0.1)
    assert (output.shape, output.dtype, output.requires_grad) == (rows[0].shape, dtype, True)
    if dtype == torch.bfloat16:
        gradients = torch.autograd.grad(output.sum(), rows)
        assert [gradient.shape for gradient in gradients] == [row.shape for row in rows]


def kernels_used(attention: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """Return which kinds of attention a call of `attend` on the meta device uses."""
    from tercet.model import packed_attention

    used: list[str] = []
    for name in ("fused_attention", "_with_bounds", "attend_in_matrices"):
        monkeypatch.setattr(packed_attention, name, lambda *given, of=name: [used.append(of), given[2]][1])
    monkeypatch.setattr(packed_attention, "_knows_bounds", lambda *_: True)
    monkeypatch.setattr(packed_attention, "bounds_obstacle", lambda *_: None)
    attend(*meta_rows(torch.bfloat16), meta_layout(attention), 0.3, **options)
    return used


def test_only_the_switch_and_the_choice_of_a_run_lead_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_used(None, monkeypatch) == ["_with_bounds"]
    assert kernels_used("fused", monkeypatch) == ["fused_attention"]
    monkeypatch.setenv(module.SWITCH, "1")
    assert kernels_used(None, monkeypatch) == ["fused_attention"]
    assert kernels_used("bounds", monkeypatch) == ["_with_bounds"]
    assert kernels_used("matrices", monkeypatch) == ["attend_in_matrices"]
    bias = torch.empty(4, 9, 9, device="meta")
    assert kernels_used("fused", monkeypatch, bias=bias) == ["attend_in_matrices"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            BertConfig(hidden_size=32, num_attention_heads=4),
            {Case(8), Case(8, has_dropout=True)},
        ),
        (
            ModernBertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=99, pad_token_id=0),
            {Case(8), Case(8, is_windowed=True)},
        ),
        (
            Qwen2Config(
                hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=99
            ),
            {Case(8, queries_per_key=2, is_causal=True)},
        ),
    ],
)
def test_what_the_layers_of_a_model_ask_for(config: Any, expected: set[Case]) -> None:
    with torch.device("meta"):
        assert {*cases_of(AutoModel.from_config(config))} == expected


def test_layers_that_no_gpu_can_run_so_do_not_keep_others_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ModernBERT in 32 bits has windows on both sides in some layers."""
    tried: list[Case] = []
    monkeypatch.setattr(packed_model, "fused_obstacle", lambda _, __, case: tried.append(case))
    monkeypatch.setenv(module.SWITCH, "1")
    gpu = torch.device("cuda", 0)
    model = SentenceTransformer(str(tiny_encoder(tmp_path, "modernbert", all_texts())), device="cpu")
    assert packed_model.fused_kernel_obstacle(model, gpu, torch.float32) is None
    assert tried == [Case(8)]
    tried.clear()
    assert packed_model.fused_kernel_obstacle(model, gpu, torch.bfloat16) is None
    assert tried == [Case(8), Case(8, is_windowed=True)]
    monkeypatch.setenv(module.SWITCH, "0")
    assert module.SWITCH in str(packed_model.fused_kernel_obstacle(model, gpu, torch.bfloat16))
