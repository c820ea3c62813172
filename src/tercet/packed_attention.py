"""Attention over one row of many texts, each of which sees only itself.

Registered with transformers 5.23 under a name, so that the models' own code calls it. It gets the queries, keys and
values of the whole row and, through the keyword arguments of the forward pass, the row's layout. Without a layout it is
transformers' own `sdpa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tercet.dropout import draw_kept
from tercet.packing import attention_groups

PACKED_ATTENTION = "tercet_packed"

# Added to the scores of keys where no token lies: exp of it is 0, and 16 bits hold it. Not -inf: in a window, a padded
# query may see no token at all, and its softmax would be NaN.
NO_TOKEN = -3e4


class Block(NamedTuple):
    """A group of texts as one batch of attention matrices."""

    num_texts: int
    width: int
    num_tokens: int
    real: torch.Tensor | None = None
    """Shape (num_tokens,): where in the padded texts each token lies. None where all are of one length."""
    bias: torch.Tensor | None = None
    """Shape (num_texts, 1, 1, width): NO_TOKEN where none lies."""


class Layout:
    """Where the texts lie in a row, shortest first."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths: tokens of each text, ascending, 1 or more."""
        self.max_length = lengths[-1]
        self._lengths, self._device = lengths, device
        self._blocks: list[Block] | None = None
        self._cu_seq_lens: torch.Tensor | None = None

    @property
    def blocks(self) -> list[Block]:
        """For attention that knows matrices only."""
        if self._blocks is None:
            groups = attention_groups(self._lengths)
            self._blocks = [_block(self._lengths[start:stop], width, self._device) for start, stop, width in groups]
        return self._blocks

    @property
    def cu_seq_lens(self) -> torch.Tensor:
        """Shape (number of texts + 1,), int32: the bounds of the texts, for attention that knows them."""
        if self._cu_seq_lens is None:
            ends = torch.tensor([0, *self._lengths]).cumsum(0)
            self._cu_seq_lens = ends.to(self._device, torch.int32)
        return self._cu_seq_lens


def _block(lengths: Sequence[int], width: int, device: torch.device) -> Block:
    num_tokens = sum(lengths)
    if num_tokens == len(lengths) * width:
        return Block(len(lengths), width, num_tokens)
    is_real = torch.arange(width) < torch.tensor(lengths)[:, None]
    bias = torch.zeros(is_real.shape).masked_fill_(~is_real, NO_TOKEN)[:, None, None]
    return Block(len(lengths), width, num_tokens, is_real.flatten().nonzero().flatten().to(device), bias.to(device))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shape (num_tokens, num_heads, head_width), as query, key and value.

    window: tokens see those less than so many places away. bias: shape (num_heads, max_length, max_length), added to
    the scores. On a GPU, in 16 bits, it is torch's attention for rows of texts; that knows neither bias nor dropout."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions may come in another type
    if value.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and not dropout and bias is None:
        reach = -1 if window is None else window - 1
        bounds, longest = layout.cu_seq_lens, layout.max_length
        output: torch.Tensor = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=(reach, reach)
        )
        return output
    grouped: torch.Tensor = GroupedAttention.apply(query, key, value, bias, layout, scaling, dropout, window)
    return grouped


class GroupedAttention(torch.autograd.Function):  # type: ignore[misc]
    """Softmax attention, one batch of matrices for each block.

    Written out: on matrices this small, torch 2.13's scaled_dot_product_attention takes longer on a CPU. Its fast
    kernel has no dropout, and its plain one looks for rows without any key (docs/log.md)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        layout: Layout,
        scaling: float,
        dropout: float,
        window: int | None,
    ) -> torch.Tensor:
        """As `attend`."""
        saved: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        num_heads = query.shape[1]
        for block, *parts in zip(layout.blocks, *_split(layout, query, key, value), strict=True):
            q, k, v = (_matrices(part, block) for part in parts)
            scores = torch.bmm(q, k.mT).mul_(scaling)
            scores_of_texts = scores.view(block.num_texts, num_heads, block.width, block.width)
            for added in _biases(block, bias, window, scores.device):
                scores_of_texts += added
            weights = torch.ops.aten._softmax(scores, -1, False)
            saved += [q, k, v, weights]
            if dropout:
                saved.append(draw_kept(weights, dropout))
                weights = weights * saved[-1]
            outputs.append(_tokens(torch.bmm(weights, v), block))
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scaling, ctx.has_dropout, ctx.has_bias = layout, scaling, bool(dropout), bias is not None
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Of query, key, value and bias."""
        saved = iter(ctx.saved_tensors)
        num_heads, longest = gradient.shape[1], ctx.layout.max_length
        of_bias = gradient.new_zeros(num_heads, longest, longest) if ctx.has_bias else None
        found: tuple[list[torch.Tensor], ...] = ([], [], [])
        for block, part in zip(ctx.layout.blocks, *_split(ctx.layout, gradient), strict=True):
            g = _matrices(part, block)
            q, k, v, weights = (next(saved) for _ in range(4))
            kept = next(saved) if ctx.has_dropout else None
            of_weights = torch.bmm(g, v.mT)
            of_v = torch.bmm((weights if kept is None else weights * kept).mT, g)
            if kept is not None:
                of_weights.mul_(kept)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            if of_bias is not None:
                of_texts = of_scores.view(block.num_texts, num_heads, block.width, block.width)
                of_bias[:, : block.width, : block.width] += of_texts.sum(dim=0)
            of_scores.mul_(ctx.scaling)
            for tokens, x in zip(found, (torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q), of_v), strict=True):
                tokens.append(_tokens(x, block))
        return (*(torch.cat(tokens) for tokens in found), of_bias, None, None, None, None)


def _split(layout: Layout, *rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each row cut into its blocks."""
    num_tokens = [block.num_tokens for block in layout.blocks]
    return [row.split(num_tokens) for row in rows]


def _matrices(tokens: torch.Tensor, block: Block) -> torch.Tensor:
    """(num_tokens, num_heads, head_width) to (num_texts * num_heads, width, head_width), zeros where no token lies."""
    _, num_heads, head_width = tokens.shape
    if block.real is not None:
        padded = tokens.new_zeros(block.num_texts * block.width, num_heads, head_width)
        tokens = padded.index_copy_(0, block.real, tokens)
    texts = tokens.reshape(block.num_texts, block.width, num_heads, head_width)
    return texts.transpose(1, 2).reshape(-1, block.width, head_width)


def _tokens(matrices: torch.Tensor, block: Block) -> torch.Tensor:
    """The way back."""
    texts = matrices.view(block.num_texts, -1, block.width, matrices.shape[-1]).transpose(1, 2)
    tokens = texts.reshape(-1, texts.shape[2], texts.shape[3])
    return tokens if block.real is None else tokens.index_select(0, block.real)


def _biases(block: Block, bias: torch.Tensor | None, window: int | None, device: torch.device) -> list[torch.Tensor]:
    """What is added to the scores of a block, each broadcast to (num_texts, num_heads, width, width)."""
    added = [] if block.bias is None else [block.bias]
    if bias is not None:
        added.append(bias[:, : block.width, : block.width])
    if window is not None and block.width > window:
        place = torch.arange(block.width, device=device)
        too_far = (place[:, None] - place).abs() >= window
        added.append(torch.zeros(too_far.shape, device=device).masked_fill_(too_far, -torch.inf))
    return added


def _attention_function(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query, key and value of shape (1, num_heads, num_tokens, head_width)."""
    if layout is None:
        arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
        padded: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)[0]
        return padded, None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, layout, scale, dropout, sliding_window)[None], None


def _mask_function(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for a row of texts, which comes without a mask: a matrix over all of its tokens would be huge."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, _attention_function)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask_function)
