"""Which test of a mean difference keeps its error rate on grouped rows? Five tests, on the nights of gate.py.

python benchmarks/gate_methods.py [--nights 2000] [--seed 0]

Counts how often each test calls a challenger better (p ≤ 0.01) that is not, by nDCG@10. The challengers are equal ones,
and ones that are equal on average but broken on one group in twenty.

subsets      means of random subsets of the groups, the sign-flip test: the one that tercet uses
percentile   bootstrap of the groups: the share of resampled means at or below 0
studentised  bootstrap of the groups, each resampled mean in units of its own standard error
t            Student's t with the standard error of groups
rows         Student's t that treats rows as independent
"""

import argparse

import numpy as np
from scipy import stats

from gate import NDCG, Floats, Split, calibrate, night, table
from tercet.evaluation.paired import Comparison, Paired

ALPHA = 0.01
SIZES = (60, 120, 200, 1_000)
NUM_RESAMPLES = 999


def bootstraps(sums: Floats, sizes: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """p values of both bootstraps, percentile and studentised. Groups are drawn with replacement."""
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), NUM_RESAMPLES).astype(float)
    effect = sums.sum() / sizes.sum()
    means = weights @ sums / (weights @ sizes)
    squares = weights @ sums**2 - 2 * means * (weights @ (sums * sizes)) + means**2 * (weights @ sizes**2)
    errors = np.sqrt(np.maximum(squares, 1e-18)) / (weights @ sizes)
    observed = effect * sizes.sum() / np.sqrt(((sums - effect * sizes) ** 2).sum())
    percentile = (1 + (means <= 0).sum()) / (NUM_RESAMPLES + 1)
    return percentile, (1 + ((means - effect) / errors >= observed).sum()) / (NUM_RESAMPLES + 1)


def p_values(paired: Paired, rng: np.random.Generator) -> list[float]:
    """p values of the five tests, in the order above."""
    difference = paired.candidate - paired.reference
    found = Comparison(paired, NUM_RESAMPLES, int(rng.integers(2**32)))
    sums, sizes = np.bincount(paired.groups, weights=difference), np.bincount(paired.groups).astype(float)
    by_groups = stats.t.sf(found.effect / found.standard_error, found.num_groups - 1)
    by_rows = stats.t.sf(difference.mean() / (difference.std(ddof=1) / len(difference) ** 0.5), len(difference) - 1)
    return [found.p_above(0.0), *bootstraps(sums, sizes, rng), by_groups, by_rows]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nights", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    nights, seed = arguments.nights, arguments.seed
    streams = iter(np.random.SeedSequence(seed).spawn(100))
    lines = []
    for trade in (False, True):
        shift = calibrate(NDCG, 0.0, trade, seed) if trade else 0.0
        for size in SIZES:
            rng = np.random.default_rng(next(streams))
            split = Split.make(size, np.random.default_rng([seed, size]))
            found = np.array([p_values(night(split, shift, trade, rng)[NDCG], rng) for _ in range(nights)])
            name = f"{'trade' if trade else 'equal'}, {size:,} rows in {split.groups[-1] + 1} groups"
            lines.append([name, *(f"{100 * share:.1f} %" for share in (found <= ALPHA).mean(axis=0))])
    table(["taken for better", "subsets", "percentile", "studentised", "t", "rows"], lines, print)
    print(f"{nights:,} nights a line, seed {seed}")


if __name__ == "__main__":
    main()
