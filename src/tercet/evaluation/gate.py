"""Decide from the results of two models on the same rows whether the candidate replaces the reference. Pure.

A candidate is promoted if the recipe's metric is shown to be better, by enough, and nothing else is in the way. Each
other metric, and each dataset out of domain, must be shown not to lose more than its limit. A slice is often too small
to show that, so it holds a candidate back only if it is shown to lose more. Too few rows decide nothing.
docs/decisions/0010-the-gate.md has the reasons, docs/benchmarks.md the error rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from tercet.artifacts.decision import (
    Estimate,
    GateDecision,
    Guard,
    Origin,
    Reason,
    ReferenceKind,
    State,
    Verdict,
    sentence,
)
from tercet.config.sections import GateConfig
from tercet.evaluation.paired import TOLERANCE, Comparison, Paired


def decide(
    results: Mapping[str, Paired],
    metric: str,
    config: GateConfig,
    out_of_domain: Mapping[str, Paired] | None = None,
    origin: Origin | None = None,
    reference: ReferenceKind = "champion",
) -> GateDecision:
    """Decide whether the candidate replaces the reference.

    results: the test split's results by metric. metric: the recipe's `evaluation.metric`, which decides.
    out_of_domain: results by name of the dataset. reference: what the reference model is.

    Neither the order nor the names of rows and groups change the decision. Raises KeyError if `results` lacks `metric`.
    """
    out_of_domain, origin = out_of_domain or {}, origin or Origin()
    everything = {**results, **{f"out of domain/{name}": paired for name, paired in out_of_domain.items()}}
    refusals = _refusals(origin, all(paired.is_finite() for paired in everything.values()))
    comparison = None if refusals or not len(results[metric].groups) else _compare(results[metric], config)
    guarded, guarded_far = ({}, {}) if refusals else (results, out_of_domain)
    others = tuple(_guard(n, p, config.max_loss, config) for n, p in guarded.items() if n != metric)
    far = tuple(_guard(n, p, config.max_loss_out_of_domain, config) for n, p in guarded_far.items())
    slices = _slices(guarded, config)
    reasons = refusals or _too_few(comparison, config) or _reasons(comparison, others, far, slices, config)
    decision = GateDecision(
        verdict=_verdict(reasons),
        reasons=reasons,
        sentence="",
        reference=reference,
        metric=metric,
        estimate=None if comparison is None else _estimate(comparison, config.alpha),
        p_better=1.0 if comparison is None else comparison.p_better(),
        mcnemar_p=None if comparison is None else comparison.mcnemar_p(),
        minimum_detectable_effect=_detectable(comparison, config),
        others=others,
        out_of_domain=far,
        slices=slices,
        origin=origin,
        results_sha256={name: paired.sha256() for name, paired in everything.items()},
        config=config,
    )
    return decision.model_copy(update={"sentence": sentence(decision)})


def _refusals(origin: Origin, finite: bool) -> tuple[Reason, ...]:
    holds: dict[Reason, bool] = {
        "leaked": origin.num_leaked_rows > 0,
        "learned_nothing": origin.learned_nothing,
        "no_op": origin.weights_sha256 is not None and origin.weights_sha256 == origin.reference_weights_sha256,
        "non_finite": origin.num_non_finite_weights > 0 or not finite,
    }
    return tuple(reason for reason in holds if holds[reason])


def _compare(paired: Paired, config: GateConfig) -> Comparison:
    return Comparison(paired, config.num_resamples, config.seed)


def _too_few(comparison: Comparison | None, config: GateConfig) -> tuple[Reason, ...]:
    if comparison is None or comparison.num_groups < config.min_groups:
        return ("too_few_groups",)
    # The p value if every group that differs were better: even that result would not be significant.
    if 0.5**comparison.num_different_groups > config.alpha:
        return ("too_few_differences",)
    return ()


def _reasons(
    comparison: Comparison | None,
    others: tuple[Guard, ...],
    far: tuple[Guard, ...],
    slices: tuple[Guard, ...],
    config: GateConfig,
) -> tuple[Reason, ...]:
    assert comparison is not None
    better = comparison.p_better() <= config.alpha
    holds: dict[Reason, bool] = {
        "not_better": not better,
        "below_minimum_effect": better and comparison.effect < config.minimum_effect - TOLERANCE,
        "worse_on_metric": any(guard.state == "worse" for guard in others),
        "worse_out_of_domain": any(guard.state == "worse" for guard in far),
        "worse_in_slice": any(guard.state == "worse" for guard in slices),
    }
    reasons = tuple(reason for reason in holds if holds[reason])
    if not reasons and any(guard.state != "not_worse" for guard in (*others, *far)):
        return ("loss_not_ruled_out",)
    return reasons or ("better",)


def _verdict(reasons: tuple[Reason, ...]) -> Verdict:
    match reasons[0]:
        case "better":
            return "promote"
        case "leaked" | "learned_nothing" | "no_op" | "non_finite":
            return "refused"
        case "too_few_groups" | "too_few_differences" | "loss_not_ruled_out":
            return "undecided"
        case _:
            return "keep"


def _detectable(comparison: Comparison | None, config: GateConfig) -> float | None:
    if comparison is None or comparison.num_groups < 2 or comparison.num_different_groups == 0:
        return None
    return comparison.minimum_detectable_effect(config.alpha, config.minimum_effect)


def _estimate(comparison: Comparison, alpha: float) -> Estimate:
    lower, upper = (bound if math.isfinite(bound) else None for bound in comparison.bounds(alpha))
    return Estimate(lower=lower, upper=upper, confidence=1 - alpha, **comparison.facts())


def _guard(name: str, paired: Paired, max_loss: float, config: GateConfig) -> Guard:
    """Test whether something loses more than `max_loss`: shown to (worse), shown not to (not_worse), or undecided."""
    comparison = _compare(paired, config) if len(paired.groups) else None
    estimate = None if comparison is None else _estimate(comparison, config.guard_alpha)
    p_not_worse = 1.0 if comparison is None else comparison.p_above(-max_loss)
    p_worse = 1.0 if comparison is None else comparison.p_below(-max_loss)
    state: State = "undecided"
    if _has_enough(estimate, config) and p_not_worse <= config.guard_alpha:
        state = "not_worse"
    elif _has_enough(estimate, config) and p_worse <= config.guard_alpha:
        state = "worse"
    return Guard(
        name=name,
        estimate=estimate,
        max_loss=max_loss,
        p_not_worse=p_not_worse,
        p_worse=p_worse,
        alpha=config.guard_alpha,
        state=state,
    )


def _has_enough(estimate: Estimate | None, config: GateConfig) -> bool:
    return estimate is not None and estimate.num_groups >= config.min_groups


def _slices(results: Mapping[str, Paired], config: GateConfig) -> tuple[Guard, ...]:
    """Guard each slice of each metric.

    A slice that is shown to be worse is a veto, so many slices are many chances of a false one. Holm's correction over
    the slices with enough groups accounts for that."""
    guards = [
        _guard(f"{metric}/{name}", paired.only(rows), config.max_loss_in_slice, config)
        for metric, paired in results.items()
        for name, rows in paired.slices.items()
    ]
    ordered = sorted((g for g in guards if _has_enough(g.estimate, config)), key=lambda guard: guard.p_worse)
    alphas = {guard.name: config.guard_alpha / (len(ordered) - rank) for rank, guard in enumerate(ordered)}
    worse = {guard.name for guard in itertools.takewhile(lambda g: g.p_worse <= alphas[g.name], ordered)}
    return tuple(
        guard.model_copy(
            update={
                "alpha": alphas.get(guard.name, guard.alpha),
                "state": "worse" if guard.name in worse else "undecided" if guard.state == "worse" else guard.state,
            }
        )
        for guard in guards
    )
