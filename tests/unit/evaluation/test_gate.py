"""Every verdict and every reason, close to its limit; and candidates that must never be promoted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tercet.artifacts.decision import Origin
from tercet.config.sections import GateConfig
from tercet.evaluation.gate import GateDecision, decide
from tercet.evaluation.paired import TRIPLET_ACCURACY, Paired

NDCG = "ndcg@10"
CONFIG = GateConfig(num_resamples=999)
NUM_ROWS = 400
HALVES = np.arange(NUM_ROWS) % 2 == 0


def ndcg(gain: float, spread: float = 0.1, num_rows: int = NUM_ROWS, **more: Any) -> Paired:
    """Make differences of exactly this mean: one half of the rows is `spread` above it, the other half below."""
    reference = np.full(num_rows, 0.5)
    return Paired.of(NDCG, reference, reference + gain + np.resize([spread, -spread], num_rows), **more)


def triplets(num_better: int, num_worse: int, num_rows: int = NUM_ROWS, **more: Any) -> Paired:
    reference = np.ones(num_rows)
    candidate = reference.copy()
    reference[:num_better] = 0
    candidate[num_better : num_better + num_worse] = 0
    return Paired.of(TRIPLET_ACCURACY, reference, candidate, **more)


def gate(*results: Paired, metric: str = NDCG, config: GateConfig = CONFIG, **more: Any) -> GateDecision:
    decision = decide({paired.metric: paired for paired in results}, metric, config, **more)
    assert (decision.verdict == "promote") == (decision.reasons == ("better",))
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    return decision


def test_a_better_candidate_is_promoted() -> None:
    decision = gate(ndcg(0.03), triplets(20, 10))
    assert (decision.verdict, decision.reasons) == ("promote", ("better",))
    assert decision.estimate is not None
    assert decision.estimate.effect == pytest.approx(0.03)
    assert decision.p_better == 0.001  # none of 999 subsets
    assert decision.mcnemar_p is None
    assert decision.sentence == (
        f"Promote: ndcg@10 0.5000 → 0.5300 (+3.00 points, at least +{100 * decision.estimate.lower:.2f} points "  # type: ignore[operator]
        "at 99%, p = 0.001), and nothing else is in the way."
    )


@pytest.mark.parametrize("gain", [0.0, -0.03])
def test_a_candidate_that_is_not_better_is_not_promoted(gain: float) -> None:
    """Nor is one that is shown to be worse: the test is one-sided."""
    decision = gate(ndcg(gain), triplets(20, 10))
    assert (decision.verdict, decision.reasons) == ("keep", ("not_better",))
    assert decision.sentence.startswith("Keep the champion: ndcg@10 0.5000 → ")
    assert "a true gain of 1.59 points is found with a probability of 80 %" in decision.sentence


def test_the_recipes_metric_decides() -> None:
    results = ndcg(0.0), triplets(30, 5)
    assert gate(*results).verdict == "keep"
    decision = gate(*results, metric=TRIPLET_ACCURACY)
    assert decision.verdict == "promote"
    assert decision.mcnemar_p == pytest.approx(stats.binomtest(30, 35, alternative="greater").pvalue)
    assert [guard.name for guard in decision.others] == [NDCG]
    assert gate(ndcg(0.03)).verdict == "promote"  # a dataset of pairs has no triplets
    with pytest.raises(KeyError):
        gate(ndcg(0.03), metric=TRIPLET_ACCURACY)


def test_alpha_is_the_limit_of_the_p_value() -> None:
    decision = gate(triplets(14, 4), metric=TRIPLET_ACCURACY, config=GateConfig())
    p = decision.p_better
    assert 0.01 < p < 0.02
    assert decision.verdict == "keep"
    assert gate(triplets(14, 4), metric=TRIPLET_ACCURACY, config=GateConfig(alpha=p)).verdict == "promote"
    assert gate(triplets(14, 4), metric=TRIPLET_ACCURACY, config=GateConfig(alpha=p - 1e-6)).verdict == "keep"
    # Two-sided, this p value would be twice as large, and not significant.
    one_sided = gate(triplets(17, 5), metric=TRIPLET_ACCURACY, config=GateConfig())
    assert one_sided.p_better <= 0.01 < 2 * one_sided.p_better
    assert one_sided.verdict == "promote"


def test_a_gain_of_exactly_the_minimum_is_enough() -> None:
    assert gate(ndcg(0.005, spread=0.01)).verdict == "promote"
    decision = gate(ndcg(0.0049, spread=0.01))
    assert (decision.verdict, decision.reasons) == ("keep", ("below_minimum_effect",))
    assert "less than 0.5 points is not worth a new model" in decision.sentence
    assert gate(ndcg(0.0049, spread=0.01), config=GateConfig(minimum_effect=0.0)).verdict == "promote"


def test_rounding_does_not_miss_the_minimum() -> None:
    """12 of 400 are exactly 0.03, but a mean of sums may be off by rounding."""
    assert 12 / 400 == 0.03
    for minimum, verdict in ((0.03, "promote"), (0.0301, "keep")):
        config = GateConfig(minimum_effect=minimum)
        assert gate(triplets(14, 2), metric=TRIPLET_ACCURACY, config=config).verdict == verdict
    assert gate(ndcg(0.07), config=GateConfig(minimum_effect=0.07 + 1e-15)).verdict == "promote"


def test_groups_are_counted_and_not_rows() -> None:
    """A gain that is significant with 400 rows is not with 57 groups in which all rows move together."""
    block = np.arange(NUM_ROWS) // 7
    reference = np.full(NUM_ROWS, 0.5)
    candidate = reference + np.where(block % 5 < 3, 0.1, -0.1)
    assert gate(Paired.of(NDCG, reference, candidate)).verdict == "promote"
    decision = gate(Paired.of(NDCG, reference, candidate, block))
    assert (decision.verdict, decision.reasons) == ("keep", ("not_better",))


@pytest.mark.parametrize(
    ("better", "worse", "verdict", "reason"),
    [(0, 4, "promote", "better"), (0, 10, "undecided", "loss_not_ruled_out"), (0, 30, "keep", "worse_on_metric")],
)
def test_the_other_metric_must_be_shown_not_to_lose(better: int, worse: int, verdict: str, reason: str) -> None:
    decision = gate(ndcg(0.03), triplets(better, worse))
    assert (decision.verdict, decision.reasons) == (verdict, (reason,))
    assert decision.others[0].state == {"promote": "not_worse", "undecided": "undecided", "keep": "worse"}[verdict]
    if verdict == "undecided":
        assert "a loss of more than 2 points in triplet_accuracy cannot be ruled out (-2.50 points, betw" in (
            decision.sentence
        )


def test_a_worse_metric_and_a_missing_gain_are_both_reported() -> None:
    decision = gate(ndcg(0.0), triplets(0, 30))
    assert decision.reasons == ("not_better", "worse_on_metric")
    assert "; the candidate loses on triplet_accuracy, more than 2 points (-7.50 points, between" in decision.sentence


def test_forgetting() -> None:
    def among(gain: float, num_rows: int = NUM_ROWS) -> GateDecision:
        return gate(ndcg(0.03), out_of_domain={"mails": ndcg(gain, num_rows=num_rows)})

    assert among(0.0).verdict == "promote"
    assert among(-0.05).reasons == ("worse_out_of_domain",)
    assert among(-0.02).reasons == ("loss_not_ruled_out",)
    assert among(0.0, num_rows=49).reasons == ("loss_not_ruled_out",)
    assert among(0.0, num_rows=0).reasons == ("loss_not_ruled_out",)
    assert "forgets mails, more than 2 points" in among(-0.05).sentence
    assert list(among(0.0).results_sha256) == [NDCG, "out of domain/mails"]


def with_slices(**losses: float) -> Paired:
    """Add 100 rows for each slice, which lose that much. Overall there is a gain."""
    many = ndcg(0.2, num_rows=2_000)
    parts = [ndcg(-loss, num_rows=100) for loss in losses.values()]
    slices = {}
    for number, name in enumerate(losses):
        slices[name] = np.zeros(2_000 + 100 * len(parts), dtype=bool)
        slices[name][2_000 + 100 * number : 2_100 + 100 * number] = True
    reference = np.concatenate([part.reference for part in (many, *parts)])
    return Paired.of(NDCG, reference, np.concatenate([part.candidate for part in (many, *parts)]), None, slices)


def test_a_slice_that_is_shown_to_be_worse_is_a_veto() -> None:
    decision = gate(with_slices(en=0.0, de=0.1))
    assert (decision.verdict, decision.reasons) == ("keep", ("worse_in_slice",))
    assert [(guard.name, guard.state) for guard in decision.slices] == [
        ("ndcg@10/en", "not_worse"),
        ("ndcg@10/de", "worse"),
    ]
    assert "the candidate loses in ndcg@10/de, more than 5 points (-10.00 points, " in decision.sentence


def test_an_undecided_slice_is_no_veto() -> None:
    decision = gate(with_slices(de=0.05))
    assert decision.verdict == "promote"
    assert decision.slices[0].state == "undecided"


def test_a_slice_with_too_few_groups_is_undecided() -> None:
    few, none = np.arange(NUM_ROWS) < 49, np.zeros(NUM_ROWS, dtype=bool)
    broken = ndcg(0.03, slices={"few": few, "enough": np.arange(NUM_ROWS) < 50, "none": none})
    broken.candidate[few] -= 0.4
    decision = gate(dataclasses.replace(broken, candidate=broken.candidate + 0.05))
    assert [guard.state for guard in decision.slices] == ["undecided", "worse", "undecided"]
    assert decision.slices[2].estimate is None
    one_group = ndcg(0.03, slices={"one": few}, groups=np.where(few, -1, np.arange(NUM_ROWS)))
    assert gate(one_group).slices[0].state == "undecided"


def test_slices_are_corrected_for_their_number() -> None:
    """A loss that is a veto for one slice is none among ten, unless the other nine are far worse (Holm)."""
    alone = gate(with_slices(de=0.0715))
    assert 0.006 < alone.slices[0].p_worse <= 0.05
    assert alone.reasons == ("worse_in_slice",)
    others = {f"other{number}": 0.0 for number in range(9)}
    decision = gate(with_slices(de=0.0715, **others))
    assert decision.verdict == "promote"
    assert decision.slices[0].alpha == pytest.approx(0.05 / 10)
    assert decision.slices[0].state == "undecided"
    far = gate(with_slices(de=0.0715, **dict.fromkeys(others, 0.2)))
    assert far.slices[0].alpha == pytest.approx(0.05)
    assert {guard.state for guard in far.slices} == {"worse"}


def test_too_few_groups_decide_nothing() -> None:
    decision = gate(ndcg(0.3, num_rows=49))
    assert (decision.verdict, decision.reasons) == ("undecided", ("too_few_groups",))
    assert "49 rows in 49 groups are too few to decide: 50 groups are needed" in decision.sentence
    assert gate(ndcg(0.3, num_rows=50)).verdict == "promote"
    assert gate(ndcg(0.3, groups=np.zeros(NUM_ROWS))).reasons == ("too_few_groups",)
    empty = gate(ndcg(0.3, num_rows=0))
    assert (empty.reasons, empty.estimate, empty.p_better) == (("too_few_groups",), None, 1.0)


def test_too_few_differences_decide_nothing() -> None:
    """If six rows differ, no p value can be below 1/64."""
    decision = gate(triplets(6, 0), metric=TRIPLET_ACCURACY)
    assert (decision.verdict, decision.reasons) == ("undecided", ("too_few_differences",))
    assert gate(triplets(7, 0), metric=TRIPLET_ACCURACY, config=GateConfig()).verdict == "promote"
    ties = gate(ndcg(0.0, spread=0.0))
    assert (ties.verdict, ties.reasons, ties.minimum_detectable_effect) == ("undecided", ("too_few_differences",), None)
    assert "differ in 0 groups" in ties.sentence


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        (Origin(num_leaked_rows=3), "leaked"),
        (Origin(num_non_finite_weights=1), "non_finite"),
        (Origin(learned_nothing=True), "learned_nothing"),
        (Origin(weights_sha256="ab", reference_weights_sha256="ab"), "no_op"),
    ],
)
def test_candidates_that_are_refused_whatever_their_results(origin: Origin, reason: str) -> None:
    decision = gate(ndcg(0.3), origin=origin)
    assert (decision.verdict, decision.reasons) == ("refused", (reason,))
    assert decision.sentence.startswith("Refused: ")
    assert gate(ndcg(0.3), origin=Origin(weights_sha256="ab", reference_weights_sha256="cd")).verdict == "promote"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("where", ["metric", "other", "far"])
def test_a_result_that_is_not_finite_is_refused(value: float, side: str, where: str) -> None:
    results = {"metric": ndcg(0.3), "other": triplets(50, 0), "far": ndcg(0.3)}
    getattr(results[where], side)[0] = value
    decision = gate(results["metric"], results["other"], out_of_domain={"mails": results["far"]})
    assert (decision.verdict, decision.reasons) == ("refused", ("non_finite",))
    everything = Paired.of(NDCG, np.full(NUM_ROWS, 0.5), np.full(NUM_ROWS, value))
    assert gate(everything).reasons == ("non_finite",)


def test_the_first_night() -> None:
    """Without a champion, the candidate must beat the base model, by the same test."""
    assert gate(ndcg(0.03), reference="base model").verdict == "promote"
    decision = gate(ndcg(0.0), reference="base model")
    assert decision.verdict == "keep"
    assert decision.sentence.startswith("Publish nothing: ")
    assert "not shown to be better than the base model" in decision.sentence


def test_a_decision_holds_what_it_rests_on() -> None:
    decision = gate(ndcg(0.03), triplets(5, 5))
    assert decision.config == CONFIG
    assert decision.results_sha256[NDCG] == ndcg(0.03).sha256() != gate(ndcg(0.04)).results_sha256[NDCG]
    assert gate(ndcg(0.03), triplets(5, 5)) == decision
    assert decision.minimum_detectable_effect is not None


def test_equal_candidates_are_rarely_promoted_and_better_ones_usually() -> None:
    """300 nights with groups that move together. At 1 %, 8 or more promotions have a probability below 0.02."""
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(100), 3)

    def promoted(gain: float) -> int:
        num_promoted = 0
        for seed in range(300):
            noise = rng.normal(0, 0.1, 100)[groups] + rng.normal(0, 0.1, 300) * (rng.random(300) < 0.5)
            paired = Paired.of(NDCG, np.zeros(300), gain + noise, groups)
            num_promoted += gate(paired, config=GateConfig(num_resamples=999, seed=seed)).verdict == "promote"
        return num_promoted

    assert promoted(0.0) < 8
    assert promoted(-0.01) <= 1
    assert promoted(0.06) > 285
