"""How texts share a forward pass: attention matrices, padded chunks, or nothing. Pure.

In one row of real tokens, linear layers, norms and activations need no padding. Attention is told of the boundaries,
and where it knows only matrices, texts are sorted by length and cut into groups: a group is one batched attention, as
wide as its longest text. Few groups waste little time on calls, many waste little on padding; dynamic programming finds
the cut that costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Packing = Literal["packed", "chunked", "plain"]

# The architectures whose forward pass takes a row of many texts, as transformers 5.23 writes them; each is under test.
PACKED_MODEL_TYPES = ("bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
# Modules that take each text, or each of its tokens, by itself.
TEXT_BY_TEXT = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LayerNorm")
PACKED_POOLING = ("cls", "lasttoken", "max", "mean", "mean_sqrt_len_tokens")

# What a group costs in any case, in scores (pairs of positions) that could be computed instead. Measured
# on one busy CPU, for 12 heads of 32 (docs/log.md); a factor of two hardly mattered.
PAIRS_PER_GROUP = 4_000
# Padded chunks: more of them pad less, and each is a forward pass of its own. Four were faster than two; more were not
# tried.
NUM_CHUNKS = 4

Costs = npt.NDArray[np.float64]


class Group(NamedTuple):
    """Neighbours in the order of length: texts `start` to `stop` (exclusive), the longest of `width` tokens."""

    start: int
    stop: int
    width: int


class Facts(NamedTuple):
    """What decides how a model's texts can share a forward pass."""

    model_type: str | None
    """As in config.json."""
    own_code: bool
    """The architecture is Python code of the model's own folder."""
    pooling: tuple[str, ...]
    """Modes of the Pooling module."""
    is_cached: bool
    """The loss embeds mini-batches of one column by itself."""
    drops_prompts: bool = False
    """Prompts are left out of the pooling."""
    pads_left: bool = False
    """The tokenizer pads on the left."""
    other_modules: tuple[str, ...] = ()
    """Of the model's modules, those that are none of TEXT_BY_TEXT."""
    is_decoder: bool = False
    """Tokens see those before them only."""
    guide_obstacle: str | None = None
    """Why a guide of the loss, which gets the same features, cannot take them in one row."""


def choose(wanted: Literal["auto"] | Packing, facts: Facts) -> tuple[Packing, str]:
    """How training runs the forward pass, and why. What cannot be had falls back to the next best."""
    if wanted == "plain":
        return "plain", "as the recipe says"
    why_not = obstacle(facts) or (facts.guide_obstacle and f"the guide: {facts.guide_obstacle}")
    if wanted != "chunked" and why_not is None:
        return "packed", "one row of real tokens, no padding"
    why = "as the recipe says" if wanted == "chunked" else f"not packed: {why_not}"
    if facts.other_modules:
        return "plain", f"{why}; nor in chunks"
    if facts.is_cached:
        return "plain", f"{why}; the loss cuts its own mini-batches"
    if facts.drops_prompts:
        return "plain", f"{why}; a chunk has texts with different prompts, which its pooling cannot leave out"
    if facts.pads_left:
        return "plain", f"{why}; the tokenizer pads on the left"
    return "chunked", f"{why}; {NUM_CHUNKS} chunks of like lengths"


def other_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Of the classes of a model's modules, those that may look beyond a text."""
    return tuple(name for name in names if name not in TEXT_BY_TEXT)


def obstacle(facts: Facts) -> str | None:
    """Why a model cannot take its texts in one row; None where it can."""
    if facts.other_modules:
        return f"its module {facts.other_modules[0]} may look beyond a text"
    if facts.is_decoder:
        return "its tokens see only those before them"
    if facts.own_code:
        return "the model's own code would have to know of boundaries"
    if facts.model_type not in PACKED_MODEL_TYPES:
        return f"untested for the architecture {facts.model_type or 'of this model'}"
    other = [mode for mode in facts.pooling if mode not in PACKED_POOLING]
    if not facts.pooling or other:
        return f"untested for {'pooling ' + other[0] if other else 'a model without a Pooling module'}"
    return None


def attention_groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """The cheapest cut of ascending lengths into groups that share an attention matrix."""
    widths, first = np.unique(np.asarray(lengths), return_index=True)
    ends = np.append(first, len(lengths))

    def costs(stop: int) -> Costs:
        num_texts = ends[stop] - ends[:stop]
        result: Costs = PAIRS_PER_GROUP + num_texts * float(widths[stop - 1]) ** 2
        return result

    cuts = _cheapest_cuts(len(widths), costs)
    return tuple(Group(int(ends[start]), int(ends[stop]), int(widths[stop - 1])) for start, stop in cuts)


def chunks(lengths: Sequence[int]) -> tuple[Group, ...]:
    """The cut of ascending lengths into padded chunks with the fewest tokens, real or not. Always the same number of
    chunks for the same number of texts: where weights are sharded, every rank must make as many forward passes."""
    num = len(lengths)
    widths = np.asarray(lengths, dtype=np.float64)
    # best[n]: the fewest tokens of the first n texts in so many chunks
    best = np.concatenate(([0.0], np.arange(1, num + 1) * widths))
    starts: list[npt.NDArray[np.int64]] = [np.zeros(num + 1, dtype=np.int64)]
    for _ in range(1, min(NUM_CHUNKS, num)):
        previous, best = best, np.full(num + 1, np.inf)
        starts.append(np.zeros(num + 1, dtype=np.int64))
        for stop in range(len(starts), num + 1):
            start = np.arange(len(starts) - 1, stop)
            totals = previous[start] + (stop - start) * widths[stop - 1]
            starts[-1][stop] = start[int(totals.argmin())]
            best[stop] = totals.min()
    found, end = [], num
    for start_of in reversed(starts):
        found.append(Group(int(start_of[end]), end, int(lengths[end - 1])))
        end = found[-1].start
    return tuple(reversed(found))


def _cheapest_cuts(num: int, costs: Callable[[int], Costs]) -> list[tuple[int, int]]:
    """Cuts 0 to `num` into pieces; `costs(stop)` are those of the pieces that begin at 0, 1, ... and end at `stop`."""
    best, start_of = np.zeros(num + 1), np.zeros(num + 1, dtype=np.int64)
    for stop in range(1, num + 1):
        totals = best[:stop] + costs(stop)
        start_of[stop] = totals.argmin()
        best[stop] = totals.min()
    pieces, stop = [], num
    while stop:
        pieces.append((int(start_of[stop]), stop))
        stop = int(start_of[stop])
    return pieces[::-1]
