"""What a new model changes for an index, with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tercet.evaluation.comparison import IndexImpact, index_impact

IDS = np.arange(20).reshape(2, 10)
SCORES = np.tile(np.linspace(0.9, 0.0, 10), (2, 1))


def impact(ids: Any = IDS, scores: Any = SCORES, **changed: Any) -> IndexImpact:
    return index_impact(changed.get("reference", IDS), np.asarray(ids), SCORES, np.asarray(scores), 1_000_000, 0.002)


def test_nothing_changes() -> None:
    same = impact()
    assert (same.overlap_at_10, same.num_queries_with_other_first, same.mean_score_shift) == (1.0, 0, 0.0)
    assert same.embedding_seconds == 2_000
    assert IndexImpact.model_validate_json(same.model_dump_json()) == same


def test_another_order_changes_the_first_neighbour_but_not_the_overlap() -> None:
    turned = impact(IDS[:, ::-1])
    assert (turned.overlap_at_10, turned.num_queries_with_other_first) == (1.0, 2)


def test_overlap_is_per_query() -> None:
    assert impact(IDS[::-1]).overlap_at_10 == 0.0  # the other query's neighbours
    assert impact([[*range(3), *range(90, 97)], range(10, 20)]).overlap_at_10 == pytest.approx((0.3 + 1.0) / 2)


def test_scores() -> None:
    moved = impact(scores=SCORES + np.array([[0.1], [0.3]]))
    assert moved.mean_score_shift == pytest.approx(0.2)
    assert moved.score_shift_quantiles == pytest.approx({0.05: 0.11, 0.5: 0.2, 0.95: 0.29})


def test_fewer_than_ten_neighbours() -> None:
    reference = np.where(np.arange(10) < 4, IDS, -1)
    fewer = impact(np.where(np.arange(10) < 2, IDS, -1), reference=reference)
    assert fewer.overlap_at_10 == 0.5
    assert fewer.mean_score_shift == pytest.approx((0.9 + 0.8) / 2 - (0.9 + 0.8 + 0.7 + 0.6) / 4)


def test_wrong_shapes_and_repeated_neighbours_are_errors() -> None:
    with pytest.raises(ValueError, match="shape"):
        impact(IDS[:, :5])
    with pytest.raises(ValueError, match="shape"):
        impact(IDS[:0], SCORES[:0], reference=IDS[:0])
    with pytest.raises(ValueError, match="same neighbour twice"):
        impact(np.zeros((2, 10), dtype=int))
