"""How often does the gate promote a challenger that is no better, and how often one that is better?

python benchmarks/gate.py [--nights 1000] [--seed 0]

Simulated nights on test splits of 200, 1,000 and 5,000 rows in groups of 1 to 60 (3.8 on average). Each row has a
difficulty, part of which it shares with its group. A model adds noise of its own, 30 % of it shared by a group. The sum
gives the rank of the positive, hence nDCG@10 (about 0.5, half of the rows equal for both models), and whether the
triplet is right (about 0.9). These challengers must not be promoted:

equal   the same distribution as the champion's
worse   one point less of the metric
trade   equal on average: a little better on most groups, and broken on one in twenty

The gate is `decide` with its defaults, except 999 resamples, and three slices of nDCG@10. It also runs with alpha
0.005, and with its test of the metric alone. Beside it are rules that are often used instead: any gain, a gain of half
a point, and a paired test at the same alpha that treats rows as independent (Student's t; for triplets exact McNemar).
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tercet.config.sections import GateConfig
from tercet.evaluation.gate import decide
from tercet.evaluation.paired import TRIPLET_ACCURACY, Paired, slices_of

NDCG = "ndcg@10"
SIZES = (200, 1_000, 5_000)
GAINS = (0.01, 0.02, 0.05)
GAIN_PER_RANK = np.append(1 / np.log2(1 + np.arange(1, 11)), 0.0)
OWN_NOISE, SHARE_OF_GROUP = 0.8, 0.3
BROKEN_SHARE, BROKEN_BY = 0.05, 3.5
NUM_ROWS_TO_CALIBRATE = 1_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """A frozen test split, the same every night: shape (num_rows,)."""

    groups: NDArray[np.int64]
    languages: NDArray[np.int64]

    @staticmethod
    def make(num_rows: int, rng: np.random.Generator) -> "Split":
        """Group sizes are log-normal."""
        sizes = np.minimum(1 + rng.lognormal(0.8, 0.9, num_rows).astype(int), 60)
        groups = np.repeat(np.arange(num_rows), sizes)[:num_rows]
        return Split(groups, rng.choice(3, num_rows, p=(0.6, 0.3, 0.1))[groups])

    def noise(self, rng: np.random.Generator, share_of_group: float = SHARE_OF_GROUP) -> Floats:
        """Noise of variance 1, part of it shared by each group."""
        of_groups = rng.normal(size=self.groups[-1] + 1)[self.groups]
        return np.sqrt(share_of_group) * of_groups + np.sqrt(1 - share_of_group) * rng.normal(size=len(self.groups))


def measure(quality: Floats) -> dict[str, Floats]:
    """Both metrics of each row, from the model's quality on it."""
    rank = np.ceil(np.exp(np.minimum(-quality, 5.0))).clip(1, 11).astype(int)
    return {NDCG: GAIN_PER_RANK[rank - 1], TRIPLET_ACCURACY: (quality > -3.7).astype(float)}


def night(split: Split, shift: float, trade: bool, rng: np.random.Generator) -> dict[str, Paired]:
    """Draw the row results of champion and challenger."""
    difficulty = 1.9 * split.noise(rng) - 1.2
    champion = difficulty + OWN_NOISE * split.noise(rng)
    challenger = difficulty + OWN_NOISE * split.noise(rng) + shift
    if trade:
        challenger -= BROKEN_BY * (rng.random(split.groups[-1] + 1) < BROKEN_SHARE)[split.groups]
    before, after = measure(champion), measure(challenger)
    slices = {NDCG: slices_of(split.languages)}
    return {name: Paired.of(name, before[name], after[name], split.groups, slices.get(name)) for name in before}


@cache
def calibrate(metric: str, gain: float, trade: bool, seed: int) -> float:
    """The shift in quality that gives this gain on average."""
    split = Split.make(NUM_ROWS_TO_CALIBRATE, np.random.default_rng([seed, 1]))
    low, high = -0.5, 1.5
    for _ in range(14):
        shift = (low + high) / 2
        paired = night(split, shift, trade, np.random.default_rng([seed, 2]))[metric]
        low, high = (low, shift) if paired.candidate.mean() - paired.reference.mean() > gain else (shift, high)
    return shift


def rows_differ(paired: Paired, alpha: float) -> bool:
    """p value of a test that treats rows as independent."""
    difference = paired.candidate - paired.reference
    if paired.metric == TRIPLET_ACCURACY:
        better = int((difference > 0).sum())
        return float(stats.binom.sf(better - 1, better + int((difference < 0).sum()), 0.5)) <= alpha
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    return bool(stats.t.sf(difference.mean() / error, len(difference) - 1) <= alpha)


def rate(hits: int, nights: int) -> str:
    """A share with its exact 95 % interval."""
    interval = stats.binomtest(hits, nights).proportion_ci(method="exact")
    return f"{100 * hits / nights:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def simulate(
    metric: str, split: Split, shift: float, trade: bool, nights: int, stream: np.random.SeedSequence
) -> dict[str, int]:
    """Count promotions by rule."""
    rng = np.random.default_rng(stream)
    hits = dict.fromkeys(
        ("gate", "at alpha 0.005", "its test alone", "> 0", "> 0.5 points", "rows independent", "detectable"), 0
    )
    detectable = 0.0
    for _ in range(nights):
        results = night(split, shift, trade, rng)
        config = GateConfig(num_resamples=999, seed=int(rng.integers(2**32)))
        decision = decide(results, metric, config)
        effect = float((results[metric].candidate - results[metric].reference).mean())
        hits["gate"] += decision.verdict == "promote"
        hits["at alpha 0.005"] += decision.verdict == "promote" and decision.p_better <= 0.005
        hits["its test alone"] += decision.p_better <= config.alpha
        hits["> 0"] += effect > 0
        hits["> 0.5 points"] += effect > 0.005
        hits["rows independent"] += rows_differ(results[metric], config.alpha)
        detectable += decision.minimum_detectable_effect or 0.0
    hits["detectable"] = round(1e5 * detectable / nights)  # thousandths of a point
    return hits


def table(header: list[str], lines: list[list[str]], say: Callable[[str], None]) -> None:
    """Print a Markdown table."""
    for cells in (header, [":--"] + ["--:"] * (len(header) - 1), *lines):
        say("| " + " | ".join(cells) + " |")
    say("")


def main() -> None:
    """Print two tables for each metric: false promotions, and power."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nights", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    nights, seed = arguments.nights, arguments.seed
    started = time.monotonic()
    streams = iter(np.random.SeedSequence(seed).spawn(100))
    splits = {size: Split.make(size, np.random.default_rng([seed, size])) for size in SIZES}
    rules = ["gate", "at alpha 0.005", "its test alone", "> 0", "> 0.5 points", "rows independent"]
    for metric in (NDCG, TRIPLET_ACCURACY):
        challengers = {"equal": (0.0, False), "worse": (calibrate(metric, -0.01, False, seed), False)}
        challengers["trade"] = (calibrate(metric, 0.0, True, seed), True)
        lines, together = [], Counter[str]()
        for kind, (shift, trade) in challengers.items():
            for size, split in splits.items():
                hits = simulate(metric, split, shift, trade, nights, next(streams))
                together.update(hits)
                name = f"{kind}, {size:,} rows in {split.groups[-1] + 1:,} groups"
                lines.append([name, *(rate(hits[rule], nights) for rule in rules)])
        lines.append(["all together", *(rate(together[rule], nights * len(lines)) for rule in rules)])
        table([f"{metric}: promoted, though no better", *rules], lines, print)
        lines = []
        for size, split in splits.items():
            powers = [
                simulate(metric, split, calibrate(metric, gain, False, seed), False, max(nights // 4, 1), next(streams))
                for gain in GAINS
            ]
            found = f"{powers[0]['detectable'] / 1000:.1f} points"
            lines.append([f"{size:,} rows", *(rate(power["gate"], max(nights // 4, 1)) for power in powers), found])
        gains = [f"+{100 * gain:.0f} points" for gain in GAINS]
        table([f"{metric}: promoted, and better by", *gains, "detectable at 80 %"], lines, print)
    print(f"{nights:,} nights a line of the first kind, {max(nights // 4, 1):,} a cell of the second; seed {seed}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
