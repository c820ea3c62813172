"""Attention over one row of many texts, each of which attends only to itself, by the best kernel for the device.

It is registered with transformers 5.23 under a name, so the models' own code calls it. It gets the queries, keys and
values of the whole row and, as a keyword argument of the forward pass, the row's layout. Without a layout it is
transformers' `sdpa`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tercet.errors import PlanError, first_line
from tercet.model.grouped_attention import GroupedAttention, Layout, Reach, attend_by_kernel

PACKED_ATTENTION = "tercet_packed"

# Largest difference between two kernels, relative to the largest value. Rounding gives less: bfloat16 has 8 bits. A
# text that attends to another one gives about 1.
MAX_TRIAL_ERROR = 0.05

# Texts of this many tokens or more use torch's kernel. On a CPU without dropout it is 1.3 times as fast at this length
# and 3.4 times at 2,048, and its memory grows with the length, not with its square. Shorter texts are faster as
# matrices; on a CPU in 16 bits, up to twice this length; with dropout on a CPU, at any length (docs/log.md).
LONG_TEXT = 512

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Keyword arguments by which models ask for a kind of attention that is not implemented here, and its name. Some models
# give them as None.
UNSUPPORTED = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
}

logger = logging.getLogger("tercet")


class UnsupportedAttention(PlanError):
    """A model asks for a kind of attention that is not implemented for a row of texts."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    bias: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Return the attention of each token to its own text: shape (num_tokens, num_heads, value_width).

    query: shape (num_tokens, num_heads, head_width). key: shape (num_tokens, num_key_heads, head_width). value: shape
    (num_tokens, num_key_heads, value_width). num_heads must be a multiple of num_key_heads; neighbouring queries share
    a key. window: tokens attend to those less than this many places away. bias: shape (num_heads, max_length,
    max_length), added to the scores. is_causal: tokens attend to no later ones. dropout: probability for each attention
    weight.

    On a GPU in 16 bits, without bias and dropout, this is torch's kernel for rows of texts, unless it is wrong there.
    Otherwise it is `GroupedAttention`, or torch's kernel for matrices if texts are long."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings may change the type
    reach = _reach(window, is_causal)
    if _knows_bounds(query, value, dropout, bias, reach) and _uses_bounds(layout, value):
        return _with_bounds(query, key, value, layout, scaling, reach)
    key, value = (_one_for_each(x, query.shape[1]) for x in (key, value))
    slow_kernel = not value.is_cuda and value.dtype in SIXTEEN_BITS
    short, long = layout.split(2 * LONG_TEXT if slow_kernel else LONG_TEXT)
    if long is None or bias is not None or (dropout and not value.is_cuda):
        return _in_matrices(query, key, value, layout, scaling, reach, dropout, bias)
    if short is None:
        return attend_by_kernel(query, key, value, long, scaling, reach, dropout)
    num_tokens = [short.num_tokens, long.num_tokens]
    (q, q_long), (k, k_long), (v, v_long) = (rows.split(num_tokens) for rows in (query, key, value))
    short_output = _in_matrices(q, k, v, short, scaling, reach, dropout)
    return torch.cat([short_output, attend_by_kernel(q_long, k_long, v_long, long, scaling, reach, dropout)])


def _reach(window: int | None, is_causal: bool) -> Reach:
    limit = None if window is None else window - 1
    return Reach(limit, 0 if is_causal else limit)


def _one_for_each(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat the heads of keys or values, so that each query head has its own."""
    if rows.shape[1] == num_heads:
        return rows
    repeats = num_heads // rows.shape[1]
    return rows[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2)


def _knows_bounds(query: Any, value: Any, dropout: float, bias: torch.Tensor | None, reach: Reach) -> bool:
    is_tried = query.shape == value.shape and reach.before == reach.after  # not grouped, not causal
    return value.is_cuda and value.dtype in SIXTEEN_BITS and is_tried and not dropout and bias is None


def _uses_bounds(layout: Layout, value: torch.Tensor) -> bool:
    if layout.by_bounds is not None:
        return layout.by_bounds
    return bounds_obstacle(value.device, value.dtype, value.shape[-1]) is None


def _with_bounds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float, reach: Reach
) -> torch.Tensor:
    before, after = (-1 if limit is None else limit for limit in reach)
    bounds, longest = layout.cu_seq_lens, layout.max_length
    output: torch.Tensor = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(before, after)
    )
    return output


@functools.cache
def bounds_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why torch's kernel for rows of texts cannot be used on this device, or None if it can.

    It is tried on a few texts: torch's kernels need certain GPUs and widths, and one that ignored the bounds would
    silently train on nonsense. Its output and gradients must be close to those of `GroupedAttention`."""
    try:
        for reach in (Reach(), Reach(3, 3)):
            by_bounds, expected = (
                _trial(attention, device, dtype, head_width, reach) for attention in (_with_bounds, _in_matrices)
            )
            for name, left, right in zip(("output", "query", "key", "value"), by_bounds, expected, strict=True):
                error = float((left - right).abs().max() / right.abs().max())
                if not error <= MAX_TRIAL_ERROR:
                    raise ArithmeticError(f"its {name} is off by {error:.0%}")
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel, and the answer is kept
    except (RuntimeError, ValueError, ArithmeticError) as error:
        why = first_line(error)
        logger.warning("attention on %s uses a slower kernel: torch's kernel for rows of texts fails (%s)", device, why)
        return why
    return None


def _trial(
    way: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, head_width: int, reach: Reach
) -> list[torch.Tensor]:
    """Return the output of an attention for some texts, and the gradients of query, key and value, all in fp32."""
    lengths = (1, 2, 7, 7, 30)
    draw = torch.Generator().manual_seed(0)
    shape = (sum(lengths), 2, head_width)
    # The first call may be in an evaluation, which is in inference mode, or in a layer with gradient checkpointing,
    # which must not count the tensors that are saved here.
    own = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with own, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        drawn = [torch.randn(shape, generator=draw).to(device, dtype) for _ in range(4)]
        rows = [row.requires_grad_() for row in drawn[:3]]
        output = way(*rows, Layout(lengths, device), head_width**-0.5, reach)
        return [x.detach().float() for x in (output, *torch.autograd.grad(output, rows, drawn[3]))]


def _in_matrices(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    output: torch.Tensor = GroupedAttention.apply(query, key, value, bias, layout, scaling, dropout, reach)
    return output


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers calls: query, key, value of shape (1, num_heads, num_tokens, head_width).

    Returns shape (1, num_tokens, num_heads, value_width), and None in place of the attention weights. Raises
    UnsupportedAttention where a row of texts is to have an attention that is not implemented."""
    if layout is None:
        arguments = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        padded: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return padded, None
    _check_supported(query, key, kwargs)
    # squeeze, not [0]: its backward pass is a view; that of an index allocates and copies.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal is False and sliding_window is not None and sliding_window == _window_of_masks(module):
        sliding_window += 1
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)  # the default is that of transformers
    return attend(query, key, value, layout, scale, dropout, sliding_window, is_causal=is_causal)[None], None


def _window_of_masks(module: torch.nn.Module) -> int | None:
    """Return the window in the model's configuration.

    transformers' masks for a decoder that attends to later tokens too (`is_causal: false`) include the tokens that are
    exactly this many places away. Its masks for all other models that pass on this number exclude them."""
    window: int | None = getattr(getattr(module, "config", None), "sliding_window", None)
    return window


def _check_supported(query: torch.Tensor, key: torch.Tensor, options: dict[str, Any]) -> None:
    hint = "Set workers.packing to `plain` or `chunked`."
    for name, kind in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise UnsupportedAttention(f"The model's attention has {kind} (`{name}`), which a packed row lacks.", hint)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedAttention(
            "The model attends to tokens outside of the row, which packing does not allow.", hint
        )


def _mask_function(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return None for a row of texts, which has no mask: a matrix over all of its tokens would be huge."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, _attention_function)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask_function)
