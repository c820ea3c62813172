"""Attention over one row of many texts, each of which attends only to itself, by the best kernel for the device.

It is registered with transformers 5.23 under a name, so the models' own code calls it. It gets the queries, keys and
values of the whole row and, as a keyword argument of the forward pass, the row's layout. Without a layout it is
transformers' `sdpa`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tercet.errors import PlanError
from tercet.model.fused_attention import (
    SIXTEEN_BITS,
    Case,
    fused_attention,
    fused_obstacle,
    is_wanted,
    one_for_each,
    trial_obstacle,
)
from tercet.model.grouped_attention import Layout, Reach, attend_by_kernel, attend_in_matrices

PACKED_ATTENTION = "tercet_packed"

# Texts of this many tokens or more use torch's kernel. On a CPU without dropout it is 1.3 times as fast at this length
# and 3.4 times at 2,048, and its memory grows with the length, not with its square. Shorter texts are faster as
# matrices; on a CPU in 16 bits, up to twice this length; with dropout on a CPU, at any length (docs/log.md).
LONG_TEXT = 512

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

HINT = "Set workers.packing to `plain` or `chunked`."


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

    Where the run chose so and it is right there, this is `fused_attention`. Otherwise, on a GPU in 16 bits, it is
    torch's `varlen_attn`, if nothing is asked of it that it lacks. Otherwise it is `GroupedAttention`, or, for long
    texts, torch's kernel for matrices."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings may change the type
    reach = _reach(window, is_causal)
    if bias is None and _is_fused(query, value, layout, reach, dropout):
        return fused_attention(query, key, value, layout, scaling, reach, dropout)
    if _knows_bounds(query, value, dropout, bias, reach) and _uses_bounds(layout, value):
        return _with_bounds(query, key, value, layout, scaling, reach)
    key, value = (one_for_each(x, query.shape[1]) for x in (key, value))
    slow_kernel = not value.is_cuda and value.dtype in SIXTEEN_BITS
    short, long = layout.split(2 * LONG_TEXT if slow_kernel else LONG_TEXT)
    if long is None or bias is not None or (dropout and not value.is_cuda):
        return attend_in_matrices(query, key, value, layout, scaling, reach, dropout, bias)
    if short is None:
        return attend_by_kernel(query, key, value, long, scaling, reach, dropout)
    num_tokens = [short.num_tokens, long.num_tokens]
    (q, q_long), (k, k_long), (v, v_long) = (rows.split(num_tokens) for rows in (query, key, value))
    short_output = attend_in_matrices(q, k, v, short, scaling, reach, dropout)
    return torch.cat([short_output, attend_by_kernel(q_long, k_long, v_long, long, scaling, reach, dropout)])


def _reach(window: int | None, is_causal: bool) -> Reach:
    limit = None if window is None else window - 1
    return Reach(limit, 0 if is_causal else limit)


def _is_fused(query: torch.Tensor, value: torch.Tensor, layout: Layout, reach: Reach, dropout: float) -> bool:
    may_be = layout.attention == "fused" or (layout.attention is None and is_wanted())
    if not may_be or query.shape[-1] != value.shape[-1]:
        return False
    case = Case(
        query.shape[-1], query.shape[1] // value.shape[1], reach.after == 0, reach.before is not None, bool(dropout)
    )
    return fused_obstacle(value.device, value.dtype, case) is None


def _knows_bounds(query: Any, value: Any, dropout: float, bias: torch.Tensor | None, reach: Reach) -> bool:
    is_tried = query.shape == value.shape and reach.before == reach.after  # not grouped, not causal
    return value.is_cuda and value.dtype in SIXTEEN_BITS and is_tried and not dropout and bias is None


def _uses_bounds(layout: Layout, value: torch.Tensor) -> bool:
    if layout.attention is not None:
        return layout.attention == "bounds"
    return bounds_obstacle(value.device, value.dtype, value.shape[-1]) is None


def _with_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float = 0.0,
) -> torch.Tensor:
    assert not dropout
    before, after = (-1 if limit is None else limit for limit in reach)
    bounds, longest = layout.cu_seq_lens, layout.max_length
    output: torch.Tensor = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(before, after)
    )
    return output


@functools.cache
def bounds_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """Return why `varlen_attn` cannot be used on this device, or None if it can: see `trial_obstacle`."""
    cases = Case(head_width), Case(head_width, is_windowed=True)
    failures = (trial_obstacle(_with_bounds, device, dtype, case) for case in cases)
    return next((why for why in failures if why is not None), None)


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
        if attention_mask is not None and attention_mask.numel() == 0:
            raise UnsupportedAttention("The model does not pass the layout of a row on to its attention.", HINT)
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
    for name, kind in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise UnsupportedAttention(f"The model's attention has {kind} (`{name}`), which a packed row lacks.", HINT)
    if query.shape[2] != key.shape[2]:
        raise UnsupportedAttention(
            "The model attends to tokens outside of the row, which packing does not allow.", HINT
        )


def _mask_function(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return None for a row of texts, which has no mask: a matrix over all of its tokens would be huge."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, _attention_function)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask_function)
