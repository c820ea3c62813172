"""Pure: what a new model means for an index that was built with the old one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

QUANTILES = (0.05, 0.5, 0.95)


class IndexImpact(BaseModel):
    """Two models never share an index: every row is embedded again. This says how much changes for who searches."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_queries: int
    overlap_at_10: float
    """Share of the champion's ten neighbours that are among the candidate's, on average over queries."""
    num_queries_with_other_first: int
    """Queries whose nearest neighbour is another."""
    mean_score_shift: float
    """Of the similarity of the neighbours, candidate less champion: a threshold on scores has to move by about that."""
    score_shift_quantiles: dict[float, float]
    """Of the shift of each query's mean score."""
    num_rows: int
    embedding_seconds: float
    """To embed all rows of the index again, on as many machines as `seconds_per_row` was measured with."""


def index_impact(
    champion_ids: NDArray[np.int64],
    candidate_ids: NDArray[np.int64],
    champion_scores: NDArray[np.float64],
    candidate_scores: NDArray[np.float64],
    num_rows: int,
    seconds_per_row: float,
) -> IndexImpact:
    """Ids and similarity scores of each query's neighbours, best first, all of shape (num_queries, 10); negative ids
    stand for no neighbour. Raises ValueError for other shapes, no queries, or an id twice in a row."""
    arrays = (champion_ids, candidate_ids, champion_scores, candidate_scores)
    if {array.shape for array in arrays} != {(len(champion_ids), 10)} or not len(champion_ids):
        raise ValueError(f"neighbours must be of shape (num_queries, 10), not {[array.shape for array in arrays]}")
    for ids in (champion_ids, candidate_ids):
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError("a query has the same neighbour twice")
    same = (champion_ids[:, :, None] == candidate_ids[:, None, :]) & (champion_ids >= 0)[:, :, None]
    num_neighbours = np.maximum((champion_ids >= 0).sum(axis=1), 1)
    before, after = (
        np.where(ids >= 0, scores, 0).sum(axis=1) / np.maximum((ids >= 0).sum(axis=1), 1)
        for ids, scores in ((champion_ids, champion_scores), (candidate_ids, candidate_scores))
    )
    return IndexImpact(
        num_queries=len(champion_ids),
        overlap_at_10=float((same.sum(axis=(1, 2)) / num_neighbours).mean()),
        num_queries_with_other_first=int((champion_ids[:, 0] != candidate_ids[:, 0]).sum()),
        mean_score_shift=float((after - before).mean()),
        score_shift_quantiles={q: float(np.quantile(after - before, q)) for q in QUANTILES},
        num_rows=num_rows,
        embedding_seconds=num_rows * seconds_per_row,
    )
