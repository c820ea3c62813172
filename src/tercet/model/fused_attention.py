"""One kernel for the attention of a row of texts, forward and backward: torch's, which know the bounds of the texts.

In 16 bits it is flash attention, in 32 bits memory-efficient attention. Both draw dropout themselves. Python's
`torch.nn.attention.varlen` has no dropout, so the operators below it are called. They need certain GPUs, widths and
versions of torch, and one that ignored an argument would silently train on nonsense: so a trial on the device comes
before the first use.

No GPU has run this yet. Unless the environment variable TERCET_FUSED_ATTENTION is `1`, no run chooses it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tercet.artifacts.journal import as_tercet_error
from tercet.errors import OutOfMemory, first_line
from tercet.model.grouped_attention import Layout, Reach, attend_in_matrices

SWITCH = "TERCET_FUSED_ATTENTION"

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Errors that say nothing about a kernel: another try may end otherwise, so they are not kept as an answer.
TRANSIENT = (torch.OutOfMemoryError, torch.AcceleratorError)

# Largest difference from attention in fp32 on the CPU, relative to the largest value. Rounding gives less: bfloat16 has
# 8 bits, TF32 has 11. A text that attends to another one gives about 1.
MAX_ERROR = {torch.bfloat16: 0.05, torch.float16: 0.05, torch.float32: 0.01}

# The trial of dropout takes the mean over this many copies of each text. With the probability below, the mean of a
# text of one token is off by 0.33 / 16 = 0.02 (standard deviation), and the share of dropped weights by 0.013.
TRIAL_COPIES = 256
TRIAL_DROPOUT = 0.1
MAX_MEAN_ERROR = 0.15
MAX_SCALE_ERROR = 0.05
MAX_SHARE_ERROR = 0.05
MAX_MASK_ERROR = 0.03

TRIAL_LENGTHS = (1, 2, 7, 7, 30)
TRIAL_WINDOW = 4

logger = logging.getLogger("tercet")


class Case(NamedTuple):
    """What a model asks of an attention kernel, as far as a kernel may support it or not."""

    head_width: int
    queries_per_key: int = 1
    """Heads of the queries that share one of the keys and values."""
    is_causal: bool = False
    is_windowed: bool = False
    has_dropout: bool = False

    @property
    def reach(self) -> Reach:
        """A small reach of this kind."""
        limit = TRIAL_WINDOW - 1 if self.is_windowed else None
        return Reach(limit, 0 if self.is_causal else limit)


def cases_of(encoder: torch.nn.Module) -> list[Case]:
    """Return the cases that the layers of one of transformers' models may ask for, by its configuration."""
    config: Any = encoder.config
    num_heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    queries_per_key = num_heads // (getattr(config, "num_key_value_heads", None) or num_heads)
    causal = {bool(module.is_causal) for module in encoder.modules() if hasattr(module, "is_causal")} or {False}
    if getattr(config, "is_causal", None) is not None:
        causal = {config.is_causal}
    windowed = {False, getattr(config, "sliding_window", None) is not None}
    rates = [value for name, value in config.to_dict().items() if "att" in name and "drop" in name]
    drops = {False, any(isinstance(rate, float) and rate > 0 for rate in rates)}
    return [
        Case(head_width, queries_per_key, *options)
        for options in itertools.product(sorted(causal), sorted(windowed), sorted(drops))
    ]


def is_wanted() -> bool:
    """Return whether new runs, and processes outside of a run, try this attention."""
    return os.environ.get(SWITCH) == "1"


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float,
) -> torch.Tensor:
    """Return the attention of each token to its own text: shape (num_tokens, num_heads, head_width).

    query: shape (num_tokens, num_heads, head_width). key, value: shape (num_tokens, num_key_heads, head_width)."""
    attention = _flash if value.dtype in SIXTEEN_BITS else _efficient
    return attention(query, key, value, layout, scaling, reach, dropout)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float,
) -> torch.Tensor:
    before, after = (-1 if limit is None else limit for limit in reach)
    bounds, longest = layout.cu_seq_lens, layout.max_length
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        dropout,
        reach == Reach(after=0),
        False,
        scale=scaling,
        window_size_left=before,
        window_size_right=after,
    )[0]
    return output


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float,
    reach: Reach,
    dropout: float,
) -> torch.Tensor:
    key, value = (one_for_each(x, query.shape[1]) for x in (key, value))
    bounds, longest = layout.cu_seq_lens, layout.max_length
    output: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        query[None],
        key[None],
        value[None],
        None,
        bounds,
        bounds,
        longest,
        longest,
        dropout,
        0 if reach.after is None else 1,  # no mask, or causal from the top left
        True,
        scale=scaling,
        window_size=None if reach.before is None else reach.before + 1,
    )[0]
    return output.squeeze(0)


def one_for_each(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat the heads of keys or values, so that each query head has its own."""
    if rows.shape[1] == num_heads:
        return rows
    repeats = num_heads // rows.shape[1]
    return rows[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2)


@functools.cache
def fused_obstacle(device: torch.device, dtype: torch.dtype, case: Case) -> str | None:
    """Return why `fused_attention` cannot be used on this device, or None if it can.

    It is tried on a few texts. Its output and gradients must be close to those of `GroupedAttention` on the CPU; with
    dropout, their means over many draws, and the gradients must be those of the drawn weights. Raises an error that
    says nothing about the kernel, such as OutOfMemoryError, as it is."""
    if device.type == "meta":
        return None  # nothing is computed there
    if device.type != "cuda":
        return f"it needs a GPU, and here is {device.type}"
    why = known_obstacle(dtype, case)
    if why is not None:
        return why
    return trial_obstacle(fused_attention, device, dtype, case)


def known_obstacle(dtype: torch.dtype, case: Case) -> str | None:
    """Return why no GPU can use `fused_attention` for this case; None if a trial must decide."""
    if dtype not in MAX_ERROR:
        return f"it needs 16 or 32 bits, and here is {str(dtype).removeprefix('torch.')}"
    if dtype not in SIXTEEN_BITS and case.is_windowed and not case.is_causal:
        return "torch's kernel for 32 bits has no window on both sides"
    return None


def trial_obstacle(
    attention: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, case: Case
) -> str | None:
    """Return what is wrong with an attention, called as `fused_attention` is, on this device; None if nothing is.

    What is wrong is logged too."""
    why = _trial_failure(attention, device, dtype, case)
    if why is not None:
        logger.warning("attention on %s uses a slower kernel: torch's kernel for rows of texts fails (%s)", device, why)
    return why


def _trial_failure(
    attention: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, case: Case
) -> str | None:
    # The first call may be in an evaluation, which is in inference mode, or in a layer with gradient checkpointing,
    # which must not count the tensors that are saved here. The run's random numbers stay what they are.
    own = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    modes = own, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False)
    generators = [torch.default_generator, *_generators(device)]
    states = [generator.get_state() for generator in generators]
    try:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            for generator in generators:
                generator.manual_seed(0)
            _try(attention, device, dtype, case)
    except TRANSIENT:
        raise
    except RuntimeError as error:
        if isinstance(as_tercet_error(error), OutOfMemory):
            raise
        return first_line(error)
    except (ValueError, TypeError, ArithmeticError) as error:
        return first_line(error)
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
    return None


def _generators(device: torch.device) -> list[torch.Generator]:
    """Return the generator of a GPU's random numbers."""
    if device.type != "cuda":
        return []
    return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]


def _try(attention: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, case: Case) -> None:
    """Raise ArithmeticError, with the reason, where an attention is wrong."""
    num_key_heads = 2
    num_heads = num_key_heads * case.queries_per_key
    shapes = [(sum(TRIAL_LENGTHS), heads, case.head_width) for heads in (num_heads, num_key_heads, num_key_heads)]
    *rows, gradient = (torch.randn(shape).to(dtype).float() for shape in (*shapes, shapes[0]))
    expected = _output_and_gradients(_reference, rows, gradient, Layout(TRIAL_LENGTHS, torch.device("cpu")), case)
    copies = TRIAL_COPIES if case.has_dropout else 1
    on_device = [_copies(x, copies).to(device, dtype) for x in (*rows, gradient)]
    layout = Layout([length for length in TRIAL_LENGTHS for _ in range(copies)], device)
    actual = _output_and_gradients(attention, on_device[:3], on_device[3], layout, case)
    of_copies = [_of_copies(x.float().cpu(), copies) for x in actual]
    limit = MAX_MEAN_ERROR if case.has_dropout else MAX_ERROR[dtype]
    names = ("output", "gradient of the query", "gradient of the key", "gradient of the value")
    for name, texts, right in zip(names, of_copies, expected, strict=True):
        mean = torch.cat([text.mean(dim=0) for text in texts])
        error = float((mean - right).abs().max() / right.abs().max())
        if not error <= limit:
            raise ArithmeticError(f"its {name} is off by {error:.0%}")
        scale = float((mean * right).sum() / right.square().sum())
        if not abs(scale - 1) <= MAX_SCALE_ERROR:
            raise ArithmeticError(f"its {name} is {scale:.2f} times what it should be")
    if case.has_dropout:
        _check_masks(of_copies[0], of_copies[3], gradient, rows[2])


def _check_masks(
    outputs: list[torch.Tensor], value_gradients: list[torch.Tensor], gradient: torch.Tensor, value: torch.Tensor
) -> None:
    """Raise ArithmeticError if weights are not dropped at the rate asked for, or others in the backward pass.

    outputs, value_gradients: of each text, shape (copies, length, heads, head_width)."""
    share = float((outputs[0] == 0).all(dim=-1).float().mean())  # a text of one token has one weight a head
    if not abs(share - TRIAL_DROPOUT) <= MAX_SHARE_ERROR:
        raise ArithmeticError(f"its dropout drops {share:.0%} of the weights instead of {TRIAL_DROPOUT:.0%}")
    own = zip(outputs, value_gradients, gradient.split(TRIAL_LENGTHS), value.split(TRIAL_LENGTHS), strict=True)
    for output, value_gradient, g, v in own:
        # The output is linear in the values: its product with the gradient is that of the values with theirs.
        left, right = (output * g).sum(dim=(1, 2, 3)), (value_gradient * v).sum(dim=(1, 2, 3))
        scale = float(g.norm()) * float(output.norm()) / len(output) ** 0.5
        if not float((left - right).abs().max()) <= MAX_MASK_ERROR * scale:
            raise ArithmeticError("its backward pass drops other weights than its forward pass")


def _output_and_gradients(
    attention: Callable[..., torch.Tensor],
    rows: list[torch.Tensor],
    gradient: torch.Tensor,
    layout: Layout,
    case: Case,
) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in rows]
    dropout = TRIAL_DROPOUT if case.has_dropout else 0.0
    output = attention(*inputs, layout, case.head_width**-0.5, case.reach, dropout)
    return [x.detach() for x in (output, *torch.autograd.grad(output, inputs, gradient))]


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    """Return the attention by matrices, without dropout. others: as `fused_attention` takes them."""
    key, value = (one_for_each(x, query.shape[1]) for x in (key, value))
    return attend_in_matrices(query, key, value, *others[:3])


def _copies(row: torch.Tensor, num: int) -> torch.Tensor:
    """Repeat each text of a trial's row."""
    return torch.cat([text.repeat(num, 1, 1) for text in row.split(TRIAL_LENGTHS)])


def _of_copies(row: torch.Tensor, num: int) -> list[torch.Tensor]:
    """Return each text of a row that `_copies` made: shape (num, length, heads, head_width)."""
    texts = row.split([num * length for length in TRIAL_LENGTHS])
    return [text.unflatten(0, (num, length)) for text, length in zip(texts, TRIAL_LENGTHS, strict=True)]
