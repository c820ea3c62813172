"""Attention over one row of many texts, each of which attends only to itself, as matrices, on any device.

Texts of similar length share a batch of matrices, as wide as the longest of them. Matrices of short texts are computed
here. Those of long texts are left to torch, which does not keep them for the backward pass.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tercet.model.dropout import draw_kept
from tercet.model.text_groups import attention_groups
from tercet.planning.packing import Attention

# Added to the scores of padding: its exp is 0, and 16 bits can represent it. Not -inf: in a window, a padded query may
# attend to no token at all, and its softmax would be NaN.
MASKED_SCORE = -3e4


class Reach(NamedTuple):
    """How many tokens before and after itself a token attends to. None: all of its text."""

    before: int | None = None
    after: int | None = None

    def within(self, width: int) -> Reach:
        """Return the same reach for a text of `width` tokens, without limits that exclude none of them."""
        return Reach(*(None if limit is None or limit >= width - 1 else limit for limit in self))


class Block(NamedTuple):
    """A group of texts as one batch of attention matrices."""

    num_texts: int
    width: int
    start: int
    """Positions in all blocks before this one, padding included."""
    bias: torch.Tensor | None
    """Shape (num_texts, 1, 1, width): MASKED_SCORE at padding, else 0. None if the block has no padding."""

    @property
    def stop(self) -> int:
        """Positions up to the end of this block, padding included."""
        return self.start + self.num_texts * self.width


class Matrices(NamedTuple):
    """Indices that turn the tokens of a row into the matrices of its blocks, and back.

    Each head of each token is one vector. Vector `t * num_heads + h` belongs to token `t` and head `h`."""

    blocks: list[Block]
    source: torch.Tensor
    """For each row of the matrices, in order of (block, text, head, place), the index of its vector."""
    padding: torch.Tensor
    """The rows of the matrices that are padding; `source` puts some token's vector there."""
    back: torch.Tensor
    """For each vector, its row in the matrices."""


class Layout:
    """The lengths of the texts in a row, shortest first, and what is derived from them for attention."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        attention: Attention | None = None,
        cu_seq_lens: torch.Tensor | None = None,
    ) -> None:
        """lengths: tokens of each text, ascending, 1 or more. attention: the kernel to use where it can do what is
        asked; None: the best that a trial shows to be right here. cu_seq_lens: the bounds, if they are on the device
        already."""
        self.max_length, self.attention = lengths[-1], attention
        self._lengths, self._device = lengths, device
        self._matrices: dict[int, Matrices] = {}
        self._cu_seq_lens = cu_seq_lens
        self._splits: dict[int, tuple[Layout | None, Layout | None]] = {}
        self._masks: dict[tuple[int, Reach, torch.dtype], torch.Tensor | None] = {}

    def matrices(self, num_heads: int) -> Matrices:
        """Return the indices for attention as matrices. Made once for all layers with this number of heads."""
        if num_heads not in self._matrices:
            self._matrices[num_heads] = _matrices(self._lengths, num_heads, self._device)
        return self._matrices[num_heads]

    def split(self, width: int) -> tuple[Layout | None, Layout | None]:
        """Return the texts with fewer than `width` tokens, and the others; None for no texts. Made once."""
        if width not in self._splits:
            num_short = bisect.bisect_left(self._lengths, width)
            parts = (self._lengths[:num_short], self._lengths[num_short:])
            short, long = (Layout(lengths, self._device) if lengths else None for lengths in parts)
            self._splits[width] = (short, long)
        return self._splits[width]

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(self._lengths)

    def mask(self, block: Block, reach: Reach, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the terms added to the scores of a block: broadcasts to (num_texts, num_heads, width, width), or None.

        Made once: each layer keeps it for the backward pass."""
        key = (block.start, reach, dtype)
        if key not in self._masks:
            added = _biases(block, None, reach, self._device)
            self._masks[key] = sum(added[1:], added[0]).to(dtype) if added else None
        return self._masks[key]

    @property
    def cu_seq_lens(self) -> torch.Tensor:
        """The bounds of the texts: shape (num_texts + 1,), int32."""
        if self._cu_seq_lens is None:
            ends = torch.tensor([0, *self._lengths]).cumsum(0)
            self._cu_seq_lens = ends.to(self._device, torch.int32)
        return self._cu_seq_lens


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device. To a GPU it is copied from pinned memory, and the host does not wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _matrices(lengths: Sequence[int], num_heads: int, device: torch.device) -> Matrices:
    """Compute the indices on the host, each array in one piece of memory that is copied to the device once.

    Within a block, text n and head h begin at row (n * num_heads + h) * width."""
    groups = attention_groups(lengths)
    own_lengths = np.asarray(lengths, dtype=np.int64)
    first_tokens = np.cumsum(own_lengths) - own_lengths
    num_rows = sum((group.stop - group.start) * group.width for group in groups)
    heads = np.arange(num_heads)
    source = np.empty(num_rows * num_heads, np.int64)
    back = np.empty((int(own_lengths.sum()), num_heads), np.int64)
    paddings, biases, blocks, start = [], [], [], 0
    for group in groups:
        own, texts = own_lengths[group.start : group.stop, None], np.arange(group.stop - group.start)[:, None]
        first, width, places = int(first_tokens[group.start]), group.width, np.arange(group.width)
        num_texts, stop = len(own), start + len(own) * width
        tokens = first_tokens[group.start : group.stop, None] + np.minimum(places, own - 1)
        matrices = source[start * num_heads : stop * num_heads].reshape(num_texts, num_heads, width)
        np.add((tokens * num_heads)[:, None], heads[:, None], out=matrices)
        rows = (start + texts * width) * num_heads + places  # of the first head
        is_real = places < own
        back[first : first + int(own.sum())] = rows[is_real][:, None] + heads * width
        is_full = bool(own[0, 0] == width)
        if not is_full:
            paddings.append((rows[~is_real][:, None] + heads * width).ravel())
            biases.append(np.where(is_real, np.float32(0), np.float32(MASKED_SCORE)).ravel())
        blocks.append((num_texts, width, start, is_full))
        start = stop
    padding = np.concatenate([np.empty(0, np.int64), *paddings])
    bias = copied(torch.from_numpy(np.concatenate([np.empty(0, np.float32), *biases])), device)
    made, used = [], 0
    for num_texts, width, first_row, is_full in blocks:
        own_bias = None if is_full else bias[used : used + num_texts * width].view(num_texts, 1, 1, width)
        used += 0 if is_full else num_texts * width
        made.append(Block(num_texts, width, first_row, own_bias))
    return Matrices(made, *(copied(torch.from_numpy(x), device) for x in (source, padding, back.ravel())))


class GroupedAttention(torch.autograd.Function):  # type: ignore[misc]
    """Softmax attention, one batch of matrices for each block.

    Written out so that all blocks are gathered at once, and because of torch 2.13's scaled_dot_product_attention on a
    CPU: its fast kernel has no dropout, and its plain one spends time on a search for rows without any key."""

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
        reach: Reach,
    ) -> torch.Tensor:
        """Return the attention of each token to its own text: shape (num_tokens, num_heads, value_width).

        query, key: shape (num_tokens, num_heads, head_width). value: shape (num_tokens, num_heads, value_width).
        bias: shape (num_heads, max_length, max_length), added to the scores. scaling: factor of the scores. dropout:
        probability for each attention weight."""
        num_heads = query.shape[1]
        matrices = layout.matrices(num_heads)
        rows = [_gather(x, matrices) for x in (query, key, value)]
        output = torch.empty_like(rows[2])
        saved: list[torch.Tensor] = []
        for block in matrices.blocks:
            q, k, v, out = (_block_matrices(x, block, num_heads) for x in (*rows, output))
            scores = _scores(q, k, scaling)
            scores_of_texts = scores.view(block.num_texts, num_heads, block.width, block.width)
            for added in _biases(block, bias, reach, scores.device):
                scores_of_texts += added
            weights = torch.ops.aten._softmax(scores, -1, False)
            saved.append(weights)
            if dropout:
                saved.append(draw_kept(weights, dropout))
                weights = weights * saved[-1]
            torch.bmm(weights, v, out=out)
        ctx.save_for_backward(*rows, *saved)
        ctx.layout, ctx.scaling, ctx.has_dropout, ctx.has_bias = layout, scaling, bool(dropout), bias is not None
        return output.index_select(0, matrices.back).view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of query, key, value and bias; None for the other arguments."""
        num_heads, longest = gradient.shape[1], ctx.layout.max_length
        matrices = ctx.layout.matrices(num_heads)
        query, key, value, *others = ctx.saved_tensors
        saved = iter(others)
        grad_output = _gather(gradient, matrices).index_fill_(0, matrices.padding, 0.0)
        grad_bias = gradient.new_zeros(num_heads, longest, longest) if ctx.has_bias else None
        grad_rows = [torch.empty_like(x) for x in (query, key, value)]
        for block in matrices.blocks:
            rows = (query, key, value, grad_output, *grad_rows)
            q, k, v, g, grad_q, grad_k, grad_v = (_block_matrices(x, block, num_heads) for x in rows)
            weights = next(saved)
            kept = next(saved) if ctx.has_dropout else None
            grad_weights = torch.bmm(g, v.mT)
            torch.bmm((weights if kept is None else weights * kept).mT, g, out=grad_v)
            if kept is not None:
                grad_weights.mul_(kept)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if grad_bias is not None:
                grad_texts = grad_scores.view(block.num_texts, num_heads, block.width, block.width)
                grad_bias[:, : block.width, : block.width] += grad_texts.sum(dim=0)
            grad_scores.mul_(ctx.scaling)
            torch.bmm(grad_scores, k, out=grad_q)
            torch.bmm(grad_scores.mT, q, out=grad_k)
        gradients = (x.index_select(0, matrices.back).view(-1, num_heads, x.shape[-1]) for x in grad_rows)
        return (*gradients, grad_bias, *(None,) * 4)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    if query.dtype == torch.float16:
        return torch.bmm(query * scaling, key.mT)  # their product may be more than 65,504 before it is scaled
    return torch.bmm(query, key.mT).mul_(scaling)


def attend_in_matrices(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `GroupedAttention` computes, for the same arguments."""
    output: torch.Tensor = GroupedAttention.apply(query, key, value, bias, layout, scaling, dropout, reach)
    return output


def attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float,
) -> torch.Tensor:
    """Return what `GroupedAttention` returns without a bias, computed by torch's scaled_dot_product_attention."""
    num_heads = query.shape[1]
    matrices = layout.matrices(num_heads)
    rows = [_gather(x, matrices) for x in (query, key, value)]
    outputs = []
    for block in matrices.blocks:
        q, k, v = (_block_matrices(x, block, num_heads).unflatten(0, (-1, num_heads)) for x in rows)
        is_causal = reach.within(block.width) == Reach(after=0)  # needs no mask: no real token is before padding
        mask = None if is_causal else layout.mask(block, reach, query.dtype)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scaling
        )
        outputs.append(output.reshape(-1, value.shape[-1]))
    return torch.cat(outputs).index_select(0, matrices.back).view(value.shape)


def _gather(tokens: torch.Tensor, matrices: Matrices) -> torch.Tensor:
    """Turn tokens, shape (num_tokens, num_heads, head_width), into the rows of all matrices: (num_rows, head_width)."""
    return tokens.reshape(-1, tokens.shape[-1]).index_select(0, matrices.source)


def _block_matrices(rows: torch.Tensor, block: Block, num_heads: int) -> torch.Tensor:
    """Return the matrices of a block as a view: shape (num_texts * num_heads, width, head_width)."""
    own = rows[block.start * num_heads : block.stop * num_heads]
    return own.view(-1, block.width, rows.shape[-1])


def _biases(block: Block, bias: torch.Tensor | None, reach: Reach, device: torch.device) -> list[torch.Tensor]:
    """Return what is added to the scores of a block; each broadcasts to (num_texts, num_heads, width, width)."""
    added = [] if block.bias is None else [block.bias]
    if bias is not None:
        added.append(bias[:, : block.width, : block.width])
    before, after = reach.within(block.width)
    if before is not None or after is not None:
        place = torch.arange(block.width, device=device)
        ahead = place - place[:, None]
        too_far = torch.zeros_like(ahead, dtype=torch.bool)
        if before is not None:
            too_far |= ahead < -before
        if after is not None:
            too_far |= ahead > after
        added.append(torch.zeros(too_far.shape, device=device).masked_fill_(too_far, -torch.inf))
    return added
