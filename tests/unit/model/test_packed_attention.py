"""Attention over a row of texts equals torch's softmax attention over each text alone: causal, windowed, grouped."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from tercet.model import packed_attention
from tercet.model.grouped_attention import Layout
from tercet.model.packed_attention import PACKED_ATTENTION, UnsupportedAttention, attend

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def of_each_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    scaling: float,
    window: int | None,
    is_causal: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return softmax attention written out, one text and one head at a time."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        place = torch.arange(len(q))
        ahead = place - place[:, None]
        hidden = torch.zeros(len(q), len(q), dtype=torch.bool)
        if is_causal:
            hidden |= ahead > 0
        if window is not None:
            hidden |= ahead.abs() >= window
        heads = []
        for head in range(q.shape[1]):
            of_key = head * k.shape[1] // q.shape[1]
            scores = scaling * q[:, head] @ k[:, of_key].T
            if bias is not None:
                scores = scores + bias[head, : len(q), : len(q)]
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v[:, of_key])
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def drawn_case(seed: int) -> tuple[list[int], list[torch.Tensor], dict[str, Any]]:
    """Return the lengths of some texts, their queries, keys and values, and options of attention."""
    draw = random.Random(seed)
    lengths = sorted(draw.choices(range(1, draw.choice([4, 40])), k=draw.randint(1, 9)))
    num_key_heads = draw.choice([1, 2, 3])
    num_heads = num_key_heads * draw.choice([1, 1, 2, 4])
    head_width = draw.choice([2, 5, 8])
    value_width = draw.choice([head_width, head_width, 3])
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_heads, head_width), (num_key_heads, head_width), (num_key_heads, value_width)]
    rows = [
        torch.randn(sum(lengths), *shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    options: dict[str, Any] = {
        "window": draw.choice([None, 1, 2, 5, 39, 100]),
        "is_causal": draw.random() < 0.5,
        "bias": None,
    }
    if draw.random() < 0.25:
        shape = (num_heads, lengths[-1], lengths[-1])
        options["bias"] = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    return lengths, rows, options


@pytest.mark.parametrize("long_text", [512, 20, 1])
@pytest.mark.parametrize("seed", range(40))
def test_a_row_equals_each_text_alone(seed: int, long_text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output and all gradients, with texts computed here, by torch's kernel, or some by each."""
    monkeypatch.setattr(packed_attention, "LONG_TEXT", long_text)
    lengths, rows, options = drawn_case(seed)
    inputs = [*rows, *([] if options["bias"] is None else [options["bias"]])]
    found, expected = attend(*rows, Layout(lengths, CPU), 0.3, **options), of_each_text(*rows, lengths, 0.3, **options)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    gradients = [torch.autograd.grad(output, inputs, gradient) for output in (found, expected)]
    for left, right in zip(*gradients, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 3}, {"window": 3, "is_causal": True}])
def test_the_average_of_many_draws_of_dropout_is_attention_without(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    lengths, num_draws = [2, 3, 3, 9], 500
    layout = Layout(lengths, CPU)
    rows = [torch.randn(17, num_heads, 8, dtype=torch.float64, requires_grad=True) for num_heads in (4, 2, 2)]
    plain = attend(*rows, layout, 0.3, **options)
    many = Layout([length for length in lengths for _ in range(num_draws)], CPU)
    tiled = [torch.cat([text.repeat(num_draws, 1, 1) for text in x.detach().split(lengths)]) for x in rows]
    draws = attend(*tiled, many, 0.3, dropout=0.2, **options).split([num_draws * length for length in lengths])
    of_texts = [x.view(num_draws, length, 4, 8) for x, length in zip(draws, lengths, strict=True)]
    assert (torch.cat([x.mean(dim=0) for x in of_texts]) - plain).abs().max().item() < 0.2
    assert torch.cat([x.std(dim=0) for x in of_texts]).mean().item() > 0.1

    def seeded(*inputs: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attend(*inputs, layout, 0.3, dropout=0.2, **options)

    assert torch.autograd.gradcheck(seeded, tuple(rows), fast_mode=True)


@pytest.mark.parametrize(
    ("of_module", "given", "window", "expected"),
    [
        ({"is_causal": True}, {}, None, (None, True)),
        ({"is_causal": False}, {}, None, (None, False)),
        ({}, {}, None, (None, True)),  # as transformers decides
        ({"is_causal": False}, {"is_causal": True}, None, (None, True)),
        # A decoder has a window of 5 for `sliding_window: 5`, both ways if it attends to later tokens of its own.
        ({"is_causal": True, "config": SimpleNamespace(sliding_window=5)}, {}, 5, (5, True)),
        ({"is_causal": False, "config": SimpleNamespace(sliding_window=5)}, {}, 5, (5, False)),
        # transformers' mask for a decoder with `is_causal: false` has one token more.
        ({"is_causal": True, "config": SimpleNamespace(sliding_window=5)}, {"is_causal": False}, 5, (6, False)),
        # ModernBERT adds that token itself.
        ({"is_causal": False, "config": SimpleNamespace(sliding_window=4)}, {"is_causal": False}, 5, (5, False)),
    ],
)
def test_what_a_model_asks_for(of_module: Any, given: Any, window: Any, expected: tuple[int | None, bool]) -> None:
    torch.manual_seed(0)
    lengths = [1, 4, 9]
    rows = [torch.randn(1, num_heads, 14, 8, dtype=torch.float64) for num_heads in (4, 2, 2)]
    function = AttentionInterface()[PACKED_ATTENTION]
    module: Any = SimpleNamespace(**of_module)
    found = function(module, *rows, None, scaling=0.3, sliding_window=window, layout=Layout(lengths, CPU), **given)[0]
    by_token = [x[0].transpose(0, 1) for x in rows]
    assert torch.allclose(found[0], of_each_text(*by_token, lengths, 0.3, *expected, None), atol=1e-12)


@pytest.mark.parametrize("name", packed_attention.UNSUPPORTED)
def test_attention_that_a_row_does_not_support_is_refused(name: str) -> None:
    function = AttentionInterface()[PACKED_ATTENTION]
    rows = [torch.randn(1, 2, 3, 4) for _ in range(3)]
    layout = Layout([1, 2], CPU)
    module: Any = SimpleNamespace(is_causal=False)
    with pytest.raises(UnsupportedAttention, match=name):
        function(module, *rows, None, layout=layout, **{name: torch.ones(1)})
    assert function(module, *rows, None, layout=layout, **{name: None})[0].shape == (1, 3, 2, 4)
    with pytest.raises(UnsupportedAttention, match="outside of the row"):
        function(module, rows[0], *(torch.cat([x, x], dim=2) for x in rows[1:]), None, layout=layout)


def test_scores_beyond_the_range_of_fp16() -> None:
    """They are in it after scaling."""
    lengths = [2, 5]
    rows = [torch.randn(7, 2, 64, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
    rows[0], rows[1] = 60 * rows[0].sign(), 60 * rows[1].sign()
    largest = (rows[0][0] * rows[0][0]).sum()
    assert largest > torch.finfo(torch.float16).max
    rows[1][0] = rows[0][0]
    found = attend(*(x.half() for x in rows), Layout(lengths, CPU), 1e-3)
    assert torch.allclose(found.float(), attend(*rows, Layout(lengths, CPU), 1e-3), atol=0.02, rtol=0.02)
