"""Two models on the same rows: how much better one is, and how certain that is.

Rows of one group (a document, a module) rise and fall together, so the unit of chance is the group and not the row.
Every p value and bound here comes from the mean differences of random subsets of the groups. If the true difference
were `bound`, the mean of a random subset would fall below `bound` as often as above (Hartigan 1969, "Using subsample
values as typical values"; it is the sign-flip test of grouped differences, inverted). So the share of subset means
below a bound is a p value, and a quantile of the means is a confidence bound. This is exact for differences that are
symmetric about their mean; docs/decisions/0010-the-gate.md says what holds for others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

TRIPLET_ACCURACY = "triplet_accuracy"
POWER = 0.8
TOLERANCE = 1e-12  # rounding may leave this much of a sum of differences that is zero
CELLS_AT_ONCE = 4_000_000  # of the matrix of random subsets, which then takes 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """One metric of two models, row by row. All arrays have the shape (num_rows,).

    A row is a triplet (1 if right, 0 if wrong) or a query (its nDCG@10 or MRR@10)."""

    metric: str
    reference: Floats
    candidate: Floats
    groups: NDArray[np.int64]
    """Number of each row's group, from 0 on."""
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Rows of each slice. Slices may overlap."""

    @staticmethod
    def of(
        metric: str,
        reference: ArrayLike,
        candidate: ArrayLike,
        groups: ArrayLike | None = None,
        slices: Mapping[str, ArrayLike] | None = None,
    ) -> Paired:
        """Make one from anything that numpy converts to arrays.

        groups: a label for each row; without it, each row is a group of its own. slices: by name, whether each row
        belongs to the slice. Raises ValueError if lengths differ."""
        labels = np.arange(len(np.asarray(reference))) if groups is None else np.asarray(groups)
        paired = Paired(
            metric=metric,
            reference=np.asarray(reference, dtype=np.float64),
            candidate=np.asarray(candidate, dtype=np.float64),
            groups=np.unique(labels, return_inverse=True)[1].astype(np.int64),
            slices={name: np.asarray(mask, dtype=np.bool_) for name, mask in (slices or {}).items()},
        )
        shapes = {array.shape for array in (paired.reference, paired.candidate, labels, *paired.slices.values())}
        if shapes != {(len(paired.reference),)}:
            raise ValueError(
                f"{metric}: results, groups and slices must have one value for each row, not {sorted(shapes)}"
            )
        return paired

    def is_finite(self) -> bool:
        """Whether no result is NaN or infinite."""
        return bool(np.isfinite(self.reference).all() and np.isfinite(self.candidate).all())

    def only(self, rows: NDArray[np.bool_]) -> Paired:
        """Return the rows of a slice, without slices of their own."""
        return Paired(
            self.metric, self.reference[rows], self.candidate[rows], np.unique(self.groups[rows], False, True)[1]
        )

    def sha256(self) -> str:
        """Return a hash of all that is compared. Decisions store it, so it still names the reference `champion`."""
        digest = hashlib.sha256(self.metric.encode())
        named = {"champion": self.reference, "candidate": self.candidate, "groups": self.groups, **self.slices}
        for name, values in named.items():
            digest.update(
                f"\n{name} {values.dtype.str} {values.shape}\n".encode() + np.ascontiguousarray(values).tobytes()
            )
        return digest.hexdigest()


def slices_of(labels: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Return a slice for each distinct label. labels: one for each row, such as its language."""
    array = np.asarray(labels)
    return {str(label): array == label for label in np.unique(array)}


class Comparison:
    """Statistics of a `Paired`, which must have at least one row."""

    def __init__(self, paired: Paired, num_resamples: int, seed: int) -> None:
        """num_resamples: number of random subsets. A p value is a multiple of 1 / (num_resamples + 1)."""
        self.metric = paired.metric
        difference = paired.candidate - paired.reference
        self.num_rows = len(difference)
        self.num_better, self.num_worse = int((difference > 0).sum()), int((difference < 0).sum())
        self.reference, self.candidate = float(paired.reference.mean()), float(paired.candidate.mean())
        sums = np.bincount(paired.groups, weights=difference)
        sizes = np.bincount(paired.groups).astype(np.float64)
        order = np.lexsort((sizes, sums))  # so that neither the order of rows nor the names of groups matter
        self._sums, self._sizes = sums[order], sizes[order]
        self._num_resamples, self._seed = num_resamples, seed

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self._sums)

    @property
    def num_different_groups(self) -> int:
        """Number of groups in which the two models differ."""
        return int((np.abs(self._sums) > TOLERANCE).sum())

    @property
    def effect(self) -> float:
        """Mean over rows of the candidate less the reference."""
        return float(self._sums.sum() / self.num_rows)

    @property
    def standard_error(self) -> float:
        """Standard error of the effect, by groups; NaN with a single group."""
        if self.num_groups < 2:
            return math.nan
        rest = self._sums - self.effect * self._sizes
        return math.sqrt(float(rest @ rest) * self.num_groups / (self.num_groups - 1)) / self.num_rows

    @cached_property
    def _means(self) -> Floats:
        """Mean differences of random subsets of the groups, shape (num_resamples,); NaN for an empty subset."""
        rng = np.random.default_rng(self._seed)
        columns = np.stack([self._sums, self._sizes], axis=1)
        means = np.empty(self._num_resamples)
        step = max(1, CELLS_AT_ONCE // self.num_groups)
        for start in range(0, self._num_resamples, step):
            part = means[start : start + step]
            num_bytes = -(-self.num_groups // 8)
            bits = np.unpackbits(rng.integers(0, 256, (len(part), num_bytes), dtype=np.uint8), axis=1)
            totals = bits[:, : self.num_groups].astype(np.float64) @ columns
            np.divide(totals[:, 0], totals[:, 1], out=part, where=totals[:, 1] > 0)
            part[totals[:, 1] == 0] = np.nan
        return means

    def p_above(self, bound: float) -> float:
        """Return the one-sided p value of "the effect is `bound` or less": small if it is shown to be more."""
        return float(1 + (~(self._means > bound + TOLERANCE)).sum()) / (self._num_resamples + 1)

    def p_below(self, bound: float) -> float:
        """Return the one-sided p value of "the effect is `bound` or more": small if it is shown to be less."""
        return float(1 + (~(self._means < bound - TOLERANCE)).sum()) / (self._num_resamples + 1)

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Return a lower and an upper bound of the effect, each wrong with probability `alpha`."""
        rank = math.floor(alpha * (self._num_resamples + 1) + TOLERANCE) - 1
        lowest = np.sort(np.nan_to_num(self._means, nan=-np.inf))
        highest = np.sort(np.nan_to_num(self._means, nan=np.inf))
        return float(lowest[rank]), float(highest[-1 - rank])

    def mcnemar_p(self) -> float | None:
        """Return the one-sided exact McNemar p value, which treats rows as independent; None for other metrics.

        It is the chance of at least this many newly right triplets among those that changed."""
        if self.metric != TRIPLET_ACCURACY:
            return None
        return float(stats.binom.sf(self.num_better - 1, self.num_better + self.num_worse, 0.5))

    def p_better(self) -> float:
        """Return the p value of "the candidate is not better": by groups, and for triplets at least McNemar's."""
        return max(self.p_above(0.0), self.mcnemar_p() or 0.0)

    def minimum_detectable_effect(self, alpha: float, minimum_effect: float) -> float:
        """Return the true effect that is promoted with a probability of 80 %.

        Promoted means significant at `alpha` and at least `minimum_effect`. By Student's t and the standard error."""
        degrees = self.num_groups - 1
        critical = float(stats.t.isf(alpha, degrees)) * self.standard_error
        return max(critical, minimum_effect) + float(stats.t.ppf(POWER, degrees)) * self.standard_error

    def facts(self) -> dict[str, Any]:
        """Return the counts and means that an `Estimate` stores."""
        names = ("metric", "num_rows", "num_groups", "num_different_groups", "num_better", "num_worse")
        return {name: getattr(self, name) for name in (*names, "reference", "candidate", "effect")}
