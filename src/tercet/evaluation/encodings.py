"""Embeddings of the texts of one evaluation: each text is encoded once, and ranks share the work."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist

from tercet.errors import NonFiniteError
from tercet.model.collectives import gather

EXAMPLE_CHARS = 80
NOT_FINITE_HINT = "lower training.learning_rate, raise training.warmup_ratio, or look for broken rows"


class Encodings:
    """Embeddings of the texts of one evaluation, by role (query or document: a model may have a prompt for each)."""

    def __init__(self) -> None:
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
            self._embeddings.append(_encode(model, new, role, batch_size))
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


def _encode(model: Any, texts: list[str], role: str, batch_size: int) -> torch.Tensor:
    """Encode texts on all ranks together: fp32, of shape (len(texts), embedding width), the same bits on every rank.

    The texts are dealt to the ranks like cards, longest first, so that batches that run at the same time are about
    equally long. Ranks that are one text short encode the shortest one again, and the result is dropped."""
    encode = model.encode_query if role == "query" else model.encode_document
    num_ranks = num_sharing_ranks(model)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))  # stable, so the same on every rank
    texts_per_rank = math.ceil(len(texts) / num_ranks)
    dealt = order + [order[-1]] * (texts_per_rank * num_ranks - len(texts))
    own = texts if num_ranks == 1 else [texts[index] for index in dealt[dist.get_rank() :: num_ranks]]
    embeddings = encode(own, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True).float()
    if num_ranks == 1:
        return embeddings
    place = {index: (turn % num_ranks) * texts_per_rank + turn // num_ranks for turn, index in enumerate(order)}
    return torch.cat(gather(embeddings))[[place[index] for index in range(len(texts))]]
