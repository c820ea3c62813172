"""Statistics of two models on the same rows, compared with scipy, with all subsets enumerated, and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tercet.evaluation.paired import TRIPLET_ACCURACY, Comparison, Paired, slices_of

NDCG = "ndcg@10"


def compare(
    difference: list[float] | np.ndarray, groups: object = None, metric: str = NDCG, num_resamples: int = 9_999
) -> Comparison:
    """Compare with a reference that is 0 everywhere."""
    return Comparison(Paired.of(metric, np.zeros(len(difference)), difference, groups), num_resamples, seed=0)


def triplets(num_better: int, num_worse: int, num_equal: int = 50) -> Comparison:
    reference = [0] * num_better + [1] * (num_worse + num_equal)
    candidate = [1] * num_better + [0] * num_worse + [1] * num_equal
    return Comparison(Paired.of(TRIPLET_ACCURACY, reference, candidate), 99_999, seed=0)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (7, 0), (0, 7), (12, 3), (3, 12), (10, 10), (60, 40)])
def test_mcnemar_is_scipys_binomial_test(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
    assert triplets(better, worse).mcnemar_p() == pytest.approx(expected, rel=1e-12)


def test_mcnemar_by_hand() -> None:
    assert triplets(7, 0).mcnemar_p() == pytest.approx(1 / 2**7)
    assert triplets(2, 1).mcnemar_p() == pytest.approx(4 / 8)  # 2 or 3 of 3 are better
    assert compare([1.0, -1.0]).mcnemar_p() is None


@pytest.mark.parametrize(("better", "worse"), [(7, 0), (12, 3), (10, 10), (3, 9), (30, 18)])
def test_subsets_of_single_row_groups_give_mcnemar(better: int, worse: int) -> None:
    comparison = triplets(better, worse)
    assert comparison.p_above(0.0) == pytest.approx(comparison.mcnemar_p(), abs=0.006)


def test_the_p_value_is_never_below_mcnemar() -> None:
    paired = Paired.of(TRIPLET_ACCURACY, [0] * 14 + [1] * 4, [1] * 14 + [0] * 4)
    made = [Comparison(paired, 999, seed) for seed in range(20)]
    exact = stats.binomtest(14, 18, alternative="greater").pvalue
    assert min(comparison.p_above(0.0) for comparison in made) < exact
    assert min(comparison.p_better() for comparison in made) == pytest.approx(exact)


def all_subsets(sums: list[float], sizes: list[int], bound: float) -> float:
    """Return the p value of "bound or less" by enumerating every subset of the groups, the empty one included."""
    subsets = itertools.product((0, 1), repeat=len(sums))
    return float(np.mean([np.dot(subset, sums) <= bound * np.dot(subset, sizes) + 1e-12 for subset in subsets]))


@pytest.mark.parametrize("bound", [-0.2, 0.0, 0.1, 0.3])
def test_p_values_are_shares_of_all_subsets(bound: float) -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(8), [1, 4, 2, 1, 3, 1, 2, 6])
    difference = rng.normal(0.1, 0.4, len(groups))
    comparison = compare(difference, groups, num_resamples=99_999)
    sums, sizes = np.bincount(groups, difference).tolist(), np.bincount(groups).tolist()
    assert comparison.p_above(bound) == pytest.approx(all_subsets(sums, sizes, bound), abs=0.006)
    opposite = compare(-difference, groups, num_resamples=99_999)
    assert comparison.p_below(bound) == pytest.approx(opposite.p_above(-bound), abs=0.006)


def test_one_sided_both_ways() -> None:
    gain = np.full(100, 0.01) + np.tile([0.01, -0.01], 50)
    better, worse = compare(gain), compare(-gain)
    assert better.p_above(0.0) == worse.p_below(0.0) == 1e-4
    assert better.p_below(0.0) == worse.p_above(0.0) == 1.0
    assert triplets(40, 10).p_better() < 0.001
    assert triplets(10, 40).p_better() > 0.999


def test_a_p_value_and_its_bound_say_the_same() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        comparison = compare(rng.normal(0.02, 0.1, 80), rng.integers(0, 60, 80), num_resamples=1_999)
        for alpha in (0.01, 0.05):
            lower, upper = comparison.bounds(alpha)
            assert lower < comparison.effect < upper
            assert comparison.p_above(lower - 1e-9) <= alpha < comparison.p_above(lower + 1e-9)
            assert comparison.p_below(upper + 1e-9) <= alpha < comparison.p_below(upper - 1e-9)


def test_counts_and_means() -> None:
    comparison = Comparison(Paired.of(NDCG, [0.5, 1.0, 0.0, 0.3], [1.0, 0.5, 1.0, 0.3], list("aabc")), 999, 0)
    assert (comparison.num_rows, comparison.num_groups) == (4, 3)
    assert comparison.num_different_groups == 1  # the differences of group a cancel out
    assert (comparison.num_better, comparison.num_worse) == (2, 1)
    assert (comparison.reference, comparison.candidate, comparison.effect) == pytest.approx((0.45, 0.7, 0.25))


def test_the_standard_error_is_of_groups() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 1, 200)
    assert compare(rows).standard_error == pytest.approx(rows.std(ddof=1) / np.sqrt(200))
    doubled = compare(np.repeat(rows, 2), np.repeat(np.arange(200), 2))
    assert doubled.standard_error == pytest.approx(compare(rows).standard_error)


def test_copies_of_rows_prove_nothing() -> None:
    """Ten copies of a row are one group and change nothing. As independent rows, they would look like proof."""
    rng = np.random.default_rng(6)
    rows = rng.normal(0.05, 0.3, 60)
    once, copied = compare(rows), compare(np.repeat(rows, 10), np.repeat(np.arange(60), 10))
    assert copied.p_above(0.0) == once.p_above(0.0)
    assert copied.bounds(0.01) == pytest.approx(once.bounds(0.01))
    assert compare(np.repeat(rows, 10)).p_above(0.0) < once.p_above(0.0) / 10


def test_triplets_of_one_group_are_not_treated_as_independent() -> None:
    """40 of 50 changed triplets are better, which McNemar calls significant. But they are 5 groups, of which 4 gain."""
    reference = np.repeat([0, 0, 0, 0, 1], 10)
    comparison = Comparison(
        Paired.of(TRIPLET_ACCURACY, reference, 1 - reference, np.repeat(np.arange(5), 10)), 9_999, 0
    )
    assert comparison.mcnemar_p() < 0.001
    assert comparison.p_better() == comparison.p_above(0.0) == pytest.approx(6 / 32, abs=0.02)


def test_neither_order_nor_names_matter() -> None:
    rng = np.random.default_rng(7)
    difference, groups = rng.normal(0, 0.2, 300), rng.integers(0, 90, 300)
    first = compare(difference, groups)
    order = rng.permutation(300)
    names = rng.permutation(90)
    second = compare(difference[order], [f"group {names[group]}" for group in groups[order]])
    assert second.p_above(0.0) == first.p_above(0.0)
    assert second.bounds(0.01) == pytest.approx(first.bounds(0.01), abs=1e-12)
    assert second.standard_error == pytest.approx(first.standard_error)


def test_no_difference_at_all() -> None:
    comparison = compare(np.zeros(100))
    assert comparison.p_above(0.0) == comparison.p_below(0.0) == 1.0
    assert comparison.bounds(0.01) == (0.0, 0.0)
    assert comparison.p_above(-0.01) == 1e-4
    assert comparison.num_different_groups == 0


def test_differences_that_cancel_out_up_to_rounding_are_none() -> None:
    """0.1 + 0.2 - 0.3 is not zero in floating point."""
    comparison = compare(np.tile([0.1, 0.2, -0.3], 100), np.repeat(np.arange(100), 3))
    assert comparison.num_different_groups == 0
    assert comparison.p_above(0.0) == 1.0


def test_one_group_proves_nothing() -> None:
    comparison = compare(np.ones(50), np.zeros(50))
    assert comparison.p_above(0.0) > 0.4  # one of the two subsets is empty
    assert np.isnan(comparison.standard_error)
    assert comparison.bounds(0.01) == (-np.inf, np.inf)


def test_wrong_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="one value for each row"):
        Paired.of(NDCG, [1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="one value for each row"):
        Paired.of(NDCG, [1.0, 2.0], [1.0, 2.0], groups=[1])
    with pytest.raises(ValueError, match="one value for each row"):
        Paired.of(NDCG, [1.0, 2.0], [1.0, 2.0], slices={"a": [True]})


def test_slices() -> None:
    slices = slices_of(["de", "en", "de"])
    paired = Paired.of(NDCG, [0.0, 0.0, 0.0], [0.1, 0.2, 0.3], ["x", "y", "z"], slices)
    assert list(slices) == ["de", "en"]
    assert paired.only(slices["de"]).candidate.tolist() == [0.1, 0.3]
    assert paired.only(slices["de"]).groups.tolist() == [0, 1]  # numbered from 0 again


def test_the_hash_covers_all_that_is_compared() -> None:
    def paired(**changed: object) -> Paired:
        values = {"metric": NDCG, "reference": [0.0, 1.0], "candidate": [1.0, 1.0], "groups": [0, 1], **changed}
        return Paired.of(**values)  # type: ignore[arg-type]

    assert paired().sha256() == paired(groups=["a", "b"]).sha256()
    others = [
        {"metric": "m"},
        {"reference": [0, 0]},
        {"candidate": [0, 1]},
        {"groups": [0, 0]},
        {"slices": {"a": [1, 0]}},
    ]
    assert len({paired().sha256(), *(paired(**other).sha256() for other in others)}) == 6


NIGHTS = 400


def nights(effect: float, seed: int, num_groups: int = 80) -> list[Comparison]:
    """Make nights with groups of 1 to 8 rows that share half of the noise."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), 1 + np.arange(num_groups) % 8)
    made = []
    for seed in range(NIGHTS):
        common, own = rng.normal(0, 0.1, num_groups)[groups], rng.normal(0, 0.1, len(groups))
        own[rng.random(len(groups)) < 0.4] = 0
        difference = Paired.of(NDCG, np.zeros(len(groups)), effect + common + own, groups)
        made.append(Comparison(difference, 999, seed))
    return made


@pytest.mark.parametrize(("alpha", "most"), [(0.05, 31), (0.01, 10)])
def test_how_often_chance_looks_like_a_gain(alpha: float, most: int) -> None:
    """`most` is exceeded with a probability of 1 %. A test that treats rows as independent exceeds it."""
    made = nights(0.0, seed=1)
    assert stats.binom.sf(most, NIGHTS, alpha) < 0.01
    assert sum(comparison.p_above(0.0) <= alpha for comparison in made) <= most
    assert sum(comparison.bounds(alpha)[0] > 0 for comparison in made) <= most
    assert sum(comparison.bounds(alpha)[1] < 0 for comparison in made) <= most


def test_the_minimum_detectable_effect_is_detected_in_four_of_five_nights() -> None:
    for minimum in (0.0, 0.04):
        effect = float(np.mean([f.minimum_detectable_effect(0.01, minimum) for f in nights(0.0, seed=2)]))
        comparison = nights(effect, seed=3)
        promoted = sum(f.p_above(0.0) <= 0.01 and f.effect >= minimum for f in comparison)
        assert 0.72 < promoted / NIGHTS < 0.88
