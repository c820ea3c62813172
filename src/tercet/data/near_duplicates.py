"""Near-duplicate rows: both the anchor and the positive are nearly the same.

Two texts are near-duplicates if they share most of their character 5-grams: a Jaccard similarity of at least 0.8, after
`normalise` and casefolding. MinHash with locality-sensitive hashing (Broder 1997; datasketch) proposes candidates by
their anchors, and each candidate is then compared in full. So there are no false positives, and few misses: 1 in 1,500
pairs of anchors at a similarity of exactly 0.8.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from datasketch import MinHash, MinHashLSH
from xxhash import xxh32_intdigest

from tercet.data.row_checks import normalise

SIMILARITY = 0.8
NGRAM_CHARS = 5
# Two texts of similarity s share at least one of BANDS bands of ROWS hashes with probability 1 - (1 - s^ROWS)^BANDS.
BANDS, ROWS = 24, 6

_min_hashes = partial(MinHash.generator, num_perm=BANDS * ROWS, seed=1, hashfunc=xxh32_intdigest, scheme="affine32")


class NearDuplicates:
    """An index that finds the near-duplicates of a row. Holds the texts, and about 5 kB more per row."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []
        self._index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, anchors: Iterable[str], positives: Iterable[str]) -> None:
        """Add rows. They are numbered from 0, in the order in which they are added."""
        new = list(zip(map(_folded, anchors), map(_folded, positives), strict=True))
        for number, signature in enumerate(_min_hashes(_ngram_bytes(anchor) for anchor, _ in new)):
            self._index.insert(len(self._rows) + number, signature, check_duplication=False)
        self._rows += new

    def find(self, anchors: Iterable[str], positives: Iterable[str]) -> list[list[int]]:
        """For each of the given rows, the numbers of the indexed rows that are near-duplicates of it, ascending."""
        if not self._rows:
            return [[] for _ in anchors]
        queries = list(zip(map(_folded, anchors), map(_folded, positives), strict=True))
        signatures = _min_hashes(_ngram_bytes(anchor) for anchor, _ in queries)
        return [
            sorted(number for number in self._index.query(signature) if _near(row, self._rows[number]))
            for row, signature in zip(queries, signatures, strict=True)
        ]


def _near(row: tuple[str, str], other: tuple[str, str]) -> bool:
    return all(a == b or jaccard(a, b) >= SIMILARITY for a, b in zip(row, other, strict=True))


def jaccard(text: str, other: str) -> float:
    """Jaccard similarity of two texts: the share of their distinct 5-grams that both have, 0 to 1."""
    ngrams, others = _ngrams(text), _ngrams(other)
    return len(ngrams & others) / len(ngrams | others)


def _folded(text: str) -> str:
    return normalise(normalise(text).casefold())


def _ngrams(text: str) -> set[str]:
    return {text[start : start + NGRAM_CHARS] for start in range(max(len(text) - NGRAM_CHARS + 1, 1))}


def _ngram_bytes(text: str) -> list[bytes]:
    return [ngram.encode() for ngram in _ngrams(text)]
