"""What the gate decided, with every number that the decision rests on, and one sentence that a user reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from tercet.config.sections import GateConfig
from tercet.storage.documents import Document, Frozen

Verdict = Literal["promote", "keep", "undecided", "refused"]
State = Literal["not_worse", "worse", "undecided"]
Reason = Literal[
    "better",
    "not_better",
    "below_minimum_effect",
    "worse_on_metric",
    "worse_out_of_domain",
    "worse_in_slice",
    "too_few_groups",
    "too_few_differences",
    "loss_not_ruled_out",
    "leaked",
    "learned_nothing",
    "no_op",
    "non_finite",
]

ReferenceKind = Literal["champion", "base model"]


@dataclass(frozen=True)
class Role:
    """Part that a model plays in a comparison: the candidate, or the reference that the candidate is compared with.

    The reference is the champion, or the base model where there is no champion yet."""

    kind: Literal["candidate"] | ReferenceKind
    generation: int | None = None
    """Generation of the champion; None for the other kinds."""

    def __post_init__(self) -> None:
        if (self.kind == "champion") != (self.generation is not None):
            raise ValueError(f"a champion has a generation, and nothing else has one: {self}")

    @property
    def key(self) -> str:
        """Name of the role in storage: `candidate`, `base` or `champion-<generation>`."""
        return {"candidate": "candidate", "base model": "base", "champion": f"champion-{self.generation}"}[self.kind]

    @staticmethod
    def from_key(key: str) -> Role:
        """Inverse of `key`. Raises ValueError for any other text."""
        if key in ("candidate", "base"):
            return CANDIDATE if key == "candidate" else BASE_MODEL
        kind, _, generation = key.partition("-")
        if kind != "champion" or not generation.isdecimal():
            raise ValueError(f"{key!r} is no role: expected candidate, base or champion-<generation>")
        return Role("champion", int(generation))


CANDIDATE = Role("candidate")
BASE_MODEL = Role("base model")

# A role in a document is stored as its key.
StoredRole = Annotated[
    Role,
    BeforeValidator(lambda value: Role.from_key(value) if isinstance(value, str) else value),
    PlainSerializer(lambda role: role.key, return_type=str),
]


class Estimate(Frozen):
    """One metric of both models on the same rows."""

    metric: str
    num_rows: int
    num_groups: int
    num_different_groups: int
    num_better: int
    """Rows on which the candidate is better. For triplets: those that only the candidate has right."""
    num_worse: int
    reference: float = Field(validation_alias="champion", serialization_alias="champion")
    candidate: float
    effect: float
    """Candidate less reference."""
    lower: float | None
    """The effect is above this, with `confidence`. None if there are too few groups to tell."""
    upper: float | None
    """The effect is below this, with `confidence`."""
    confidence: float


class Guard(Frozen):
    """Something that must not get worse."""

    name: str
    estimate: Estimate | None
    """None if there are no rows."""
    max_loss: float
    p_not_worse: float
    """p value of "more than `max_loss` is lost": small if that is ruled out."""
    p_worse: float
    """p value of "no more than `max_loss` is lost": small if that is ruled out."""
    alpha: float
    """Threshold for `p_worse`. For slices, after Holm's correction."""
    state: State


class Origin(Frozen):
    """What is known about a candidate apart from its results."""

    weights_sha256: str | None = None
    reference_weights_sha256: str | None = Field(
        default=None, validation_alias="other_weights_sha256", serialization_alias="other_weights_sha256"
    )
    num_leaked_rows: int = 0
    """Training rows that contain answers to the test split."""
    learned_nothing: bool = False
    num_non_finite_weights: int = 0
    """Weights that are NaN or infinite, even if no row of the test split uses them."""


class GateDecision(Document):
    """A decision, and everything that it rests on."""

    once_unsealed: ClassVar[bool] = True

    verdict: Verdict
    reasons: tuple[Reason, ...]
    sentence: str
    reference: ReferenceKind = Field(validation_alias="against", serialization_alias="against")
    metric: str
    estimate: Estimate | None
    p_better: float
    """p value of "the candidate is not better", by groups. For triplets, at least `mcnemar_p`."""
    mcnemar_p: float | None
    """One-sided exact McNemar test, which treats rows as independent. For triplets only."""
    minimum_detectable_effect: float | None
    """True gain that is promoted with a probability of 80 %, if the other checks pass."""
    others: tuple[Guard, ...]
    out_of_domain: tuple[Guard, ...]
    slices: tuple[Guard, ...]
    origin: Origin
    results_sha256: dict[str, str]
    config: GateConfig


def sentence(decision: GateDecision) -> str:
    """Return the verdict and its reasons as one sentence."""
    name = f"the {decision.reference}"
    head = {
        "promote": "Promote",
        "keep": f"Keep {name}" if decision.reference == "champion" else "Publish nothing",
        "undecided": "Undecided, so nothing changes",
        "refused": "Refused",
    }[decision.verdict]
    return f"{head}: {'; '.join(_why(decision, reason, name) for reason in decision.reasons)}."


def _why(decision: GateDecision, reason: Reason, name: str) -> str:
    config, estimate, detectable = decision.config, decision.estimate, decision.minimum_detectable_effect
    power = "" if detectable is None else f"; a true gain of {_limit(detectable)} is found with a probability of 80 %"
    match reason:
        case "better":
            return f"{_change(decision)}, and nothing else is in the way"
        case "not_better":
            return f"{_change(decision)}, which is not shown to be better than {name}{power}"
        case "below_minimum_effect":
            return f"{_change(decision)}, and less than {_limit(config.minimum_effect)} is not worth a new model"
        case "worse_on_metric":
            return _worse("loses on", decision.others)
        case "worse_out_of_domain":
            return _worse("forgets", decision.out_of_domain)
        case "worse_in_slice":
            return _worse("loses in", decision.slices)
        case "loss_not_ruled_out":
            guards = [g for g in (*decision.others, *decision.out_of_domain) if g.state == "undecided"]
            return f"{_change(decision)}, but " + ", ".join(
                f"a loss of more than {_limit(guard.max_loss)} in {guard.name} cannot be ruled out{_interval(guard)}"
                for guard in guards
            )
        case "too_few_groups":
            rows, groups = (0, 0) if estimate is None else (estimate.num_rows, estimate.num_groups)
            return f"{rows:,} rows in {groups:,} groups are too few to decide: {config.min_groups:,} groups are needed"
        case "too_few_differences":
            num = 0 if estimate is None else estimate.num_different_groups
            return (
                f"the models differ in {num} groups, too few for any result to be significant at alpha {config.alpha:g}"
            )
        case "leaked":
            return f"{decision.origin.num_leaked_rows:,} rows of the training data contain answers to the test split"
        case "learned_nothing":
            return "training changed no weight"
        case "no_op":
            return f"its weights are identical to those of {name}"
        case "non_finite":
            num = decision.origin.num_non_finite_weights
            return f"{num:,} of its weights are NaN or infinite" if num else "a result is NaN or infinite"


def _change(decision: GateDecision) -> str:
    estimate = decision.estimate
    assert estimate is not None
    lower = "" if estimate.lower is None else f", at least {_points(estimate.lower)} at {estimate.confidence:.0%}"
    values = f"{decision.metric} {estimate.reference:.4f} → {estimate.candidate:.4f}"
    return f"{values} ({_points(estimate.effect)}{lower}, p = {decision.p_better:.2g})"


def _worse(verb: str, guards: tuple[Guard, ...]) -> str:
    worse = [guard for guard in guards if guard.state == "worse"]
    return f"the candidate {verb} " + ", ".join(
        f"{guard.name}, more than {_limit(guard.max_loss)}{_interval(guard)}" for guard in worse
    )


def _interval(guard: Guard) -> str:
    estimate = guard.estimate
    if estimate is None or estimate.lower is None or estimate.upper is None:
        return ""
    return f" ({_points(estimate.effect)}, between {_points(estimate.lower)} and {_points(estimate.upper)})"


def _limit(share: float) -> str:
    return f"{100 * share:.3g} points"


def _points(share: float) -> str:
    return f"{100 * share:+.2f} points"
