"""Embeddings of the texts of one evaluation: each text is encoded once, and ranks share the work."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tercet.data.text_stats import estimated_tokens_of
from tercet.errors import NonFiniteError
from tercet.model.collectives import gather
from tercet.model.precision import computing_in

EXAMPLE_CHARS = 80
TOKENS_AT_ONCE = 32_768
"""Tokens of a batch on a GPU: enough that products of a small model fill it; not measured on one."""
NOT_FINITE_HINT = "lower training.learning_rate, raise training.warmup_ratio, or look for broken rows"


class Encodings:
    """Embeddings of the texts of one evaluation, by role (query or document: a model may have a prompt for each)."""

    def __init__(self, precision: str = "fp32") -> None:
        """precision: in which a GPU encodes. A CPU does it in fp32, or in what the training has set."""
        self._precision = precision
        self._rows: dict[tuple[str, str], int] = {}
        self._embeddings: list[torch.Tensor] = []
        self.num_encoded, self.seconds = 0, 0.0
        """Number of texts encoded so far, and the time it took; `clear` resets neither."""

    def clear(self) -> None:
        """Forget all embeddings, because the model may change."""
        self._rows.clear()
        self._embeddings.clear()

    def check(self, step: int) -> None:
        """Raise NonFiniteError if an embedding is NaN or Inf. The evaluators would take it for merely far away."""
        wrong = ~torch.cat(self._embeddings).isfinite().all(dim=1)
        if wrong.any():
            text = next(text for (_, text), row in self._rows.items() if wrong[row])
            raise NonFiniteError(
                f"evaluation{f' at step {step}' if step >= 0 else ''}: the embeddings of {int(wrong.sum())} of "
                f"{len(wrong)} texts are NaN or Inf, such as that of {text[:EXAMPLE_CHARS]!r}",
                hint=NOT_FINITE_HINT,
            )

    def of(self, model: Any, texts: list[str], role: str, batch_size: int) -> torch.Tensor:
        """Return the embeddings of texts, fp32, of shape (len(texts), embedding width).

        Only texts not seen before are encoded; all ranks share that work."""
        new = [text for text in dict.fromkeys(texts) if (role, text) not in self._rows]
        if new:
            start, began = sum(len(block) for block in self._embeddings), time.monotonic()
            self._embeddings.append(encode_texts(model, new, role, batch_size, self._precision))
            self.num_encoded, self.seconds = self.num_encoded + len(new), self.seconds + time.monotonic() - began
            self._rows.update({(role, text): start + index for index, text in enumerate(new)})
        self._embeddings = [torch.cat(self._embeddings)]
        return self._embeddings[0][[self._rows[role, text] for text in texts]]


def num_sharing_ranks(model: Any) -> int:
    """Number of ranks that run this evaluation together: 1 without a process group.

    Also 1 inside sentence-transformers' `distributed_evaluation`: there one rank runs the evaluator, and the others
    only encode the slices of texts that it sends them, so they would never join a collective here."""
    if not (dist.is_available() and dist.is_initialized()) or model._distributed_inference is not None:
        return 1
    return int(dist.get_world_size())


def encode_texts(model: Any, texts: list[str], role: str, batch_size: int, precision: str = "fp32") -> torch.Tensor:
    """Encode texts on all ranks together: fp32, of shape (len(texts), embedding width), the same bits on every rank.

    On a CPU, `batch_size` texts at a time, in fp32. On a GPU in `precision`, and as many tokens at a time as
    `batch_size` texts of the greatest length have, but at most TOKENS_AT_ONCE.

    The texts are dealt to the ranks like cards, longest first, so that batches that run at the same time are about
    equally long. Ranks that are one text short encode the shortest one again, and the result is dropped."""
    encode = model.encode_query if role == "query" else model.encode_document
    num_ranks, on_cpu = num_sharing_ranks(model), model.device.type == "cpu"
    lengths = list(map(len, texts)) if on_cpu else estimated_tokens_of(texts, model.max_seq_length).tolist()
    order = sorted(range(len(texts)), key=lambda index: -lengths[index])  # stable, so the same on every rank
    texts_per_rank = math.ceil(len(texts) / num_ranks)
    dealt = order + [order[-1]] * (texts_per_rank * num_ranks - len(texts))
    if on_cpu:
        own = texts if num_ranks == 1 else [texts[index] for index in dealt[dist.get_rank() :: num_ranks]]
        embeddings = encode(own, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True).float()
        if num_ranks == 1:
            return embeddings
    else:
        own = [texts[index] for index in (dealt if num_ranks == 1 else dealt[dist.get_rank() :: num_ranks])]
        # The longest of the texts that the ranks have at the same turn: every rank makes the same batches.
        turns = [lengths[dealt[turn * num_ranks]] for turn in range(texts_per_rank)]
        batches = token_batches(turns, tokens_at_once(batch_size, model.max_seq_length))
        embeddings = torch.cat([_encode_on_gpu(encode, own[batch], precision, model.device) for batch in batches])
        if embeddings.is_cuda:
            torch.cuda.synchronize(embeddings.device)  # so that the time that is measured is that of the work
    place = {index: (turn % num_ranks) * texts_per_rank + turn // num_ranks for turn, index in enumerate(order)}
    gathered = embeddings if num_ranks == 1 else torch.cat(gather(embeddings))
    return gathered[[place[index] for index in range(len(texts))]]


def _encode_on_gpu(encode: Any, texts: list[str], precision: str, device: torch.device) -> torch.Tensor:
    """Encode texts in one forward pass, after which autocast forgets its copies of the weights."""
    with computing_in(precision, device):
        embeddings: torch.Tensor = encode(
            texts, batch_size=len(texts), show_progress_bar=False, convert_to_tensor=True
        ).float()
    return embeddings


def tokens_at_once(batch_size: int, max_seq_length: float | None) -> int:
    """Return how many tokens a GPU gets at a time: `batch_size` texts of the greatest length, or TOKENS_AT_ONCE."""
    return TOKENS_AT_ONCE if max_seq_length is None else int(min(TOKENS_AT_ONCE, batch_size * max_seq_length))


def token_batches(tokens: Sequence[int], max_tokens: int) -> list[slice]:
    """Cut texts, longest first, into batches of at most `max_tokens`, padding included. A longer text is alone.

    tokens: of each text."""
    batches, start = [], 0
    while start < len(tokens):
        stop = min(len(tokens), start + max(1, max_tokens // max(1, tokens[start])))
        batches.append(slice(start, stop))
        start = stop
    return batches
