"""The nearest texts of each query, found in blocks of queries, so that memory does not grow with their number.

The result, ties included, is that of InformationRetrievalEvaluator of sentence-transformers 6.2: the best by
(-score, id). There, all queries are compared with 50,000 texts at once: 20 GB of scores for 100,000 queries, and five
times that beside them where scores tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import normalize

TEXTS_AT_ONCE = 50_000
"""Texts that queries are compared with at a time: as many as in InformationRetrievalEvaluator."""
MAX_SCORE_BYTES = 512 * 2**20
"""Size of the scores of one block: 2,684 queries with 50,000 texts. Breaking ties takes at most as much again."""
_TIED_SHARE = 8
"""One in this many queries of a block is selected again at a time, where scores tie: each takes about five times the
bytes of its scores."""

Hit = dict[str, Any]
"""corpus_id and score, as in sentence-transformers."""


class Nearest(NamedTuple):
    """The nearest texts of each query, best first."""

    scores: torch.Tensor
    """Cosine similarities, fp32, of shape (num_queries, k)."""
    places: torch.Tensor
    """Places of these texts in the order of their ids, int64, of shape (num_queries, k)."""


def nearest(
    queries: torch.Tensor,
    num_texts: int,
    embeddings_of: Callable[[slice], torch.Tensor],
    place_of_text: torch.Tensor,
    k: int,
    max_bytes: int = MAX_SCORE_BYTES,
    texts_at_once: int = TEXTS_AT_ONCE,
) -> Nearest:
    """Return the `k` texts of the highest cosine similarity to each query, on the CPU; all texts if there are fewer.
    Of equal scores, the text with the lower place comes first.

    queries: embeddings, fp32, of shape (num_queries, width). embeddings_of: returns those of a slice of the texts.
    place_of_text: place of each text in the order of their ids, int64, of shape (num_texts,). max_bytes: bound on the
    scores that exist at one time."""
    texts_at_once = max(1, min(texts_at_once, num_texts, max_bytes // 4))
    num_blocks = math.ceil(len(queries) / max(1, max_bytes // (4 * texts_at_once)))
    best: list[Nearest | None] = [None] * num_blocks
    for start in range(0, num_texts, texts_at_once):
        texts = slice(start, min(start + texts_at_once, num_texts))
        embeddings, places = normalize(embeddings_of(texts)), place_of_text[texts].to(queries.device)
        # Blocks of equal size: the product of a very small one could round otherwise.
        for number, block in enumerate(queries.tensor_split(num_blocks)):
            scores = normalize(block) @ embeddings.T
            best[number] = _merged(best[number], _best(scores, places, min(k, len(embeddings)), len(place_of_text)), k)
            del scores  # before those of the next block are made
    blocks = [block for block in best if block is not None]
    return Nearest(torch.cat([block.scores for block in blocks]), torch.cat([block.places for block in blocks]))


def _best(scores: torch.Tensor, places: torch.Tensor, k: int, num_places: int) -> Nearest:
    """Return the k best texts of each query, in any order. scores: shape (num_queries, num_texts)."""
    values, texts = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if values.shape[1] > k:  # a tie at the cut: torch.topk takes any of the texts
        tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        values, texts = values[:, :k], texts[:, :k].clone()
        if len(tied):
            for rows in tied.split(max(1, len(scores) // _TIED_SHARE)):
                texts[rows] = _best_of_tied(scores[rows], values[rows, k - 1 :], k, places, num_places)
            values = scores.gather(1, texts)
    return Nearest(values.cpu(), places[texts].cpu())


def _best_of_tied(
    scores: torch.Tensor, cut: torch.Tensor, k: int, places: torch.Tensor, num_places: int
) -> torch.Tensor:
    """Return the k best texts of queries for which several texts have the k-th best score.

    cut: that score, of shape (num_queries, 1)."""
    places = places.to(torch.int32)
    keys = torch.where(scores == cut, places + num_places, torch.where(scores > cut, places, 2 * num_places))
    return keys.topk(k, dim=1, largest=False).indices


def _merged(one: Nearest | None, other: Nearest, k: int) -> Nearest:
    """Return the k best of both, best first."""
    scores = other.scores if one is None else torch.cat([one.scores, other.scores], dim=1)
    places = other.places if one is None else torch.cat([one.places, other.places], dim=1)
    places, order = places.sort(dim=1)
    scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return Nearest(scores[:, :k], places.gather(1, by_score)[:, :k])


class Hits(Sequence[list[Hit]]):
    """The hits of each query, best first, as sentence-transformers takes them. Each list is made when it is read."""

    def __init__(self, nearest_texts: Nearest, ids: Sequence[str]) -> None:
        """ids: of all texts, sorted."""
        self._nearest, self._ids = nearest_texts, ids

    def __len__(self) -> int:
        return len(self._nearest.scores)

    def __getitem__(self, query: Any) -> Any:
        scores, places = self._nearest.scores[query].tolist(), self._nearest.places[query].tolist()
        return [{"corpus_id": self._ids[place], "score": score} for place, score in zip(places, scores, strict=True)]

    def __iter__(self) -> Iterator[list[Hit]]:
        return (self[query] for query in range(len(self)))
