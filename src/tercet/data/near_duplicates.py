"""Rows that are nearly the same: the anchor, and the positive.

Two texts are near copies when most of their pieces of five characters are the same: a Jaccard similarity of 0.8, after
`normalise` and casefolding. MinHash with locality-sensitive hashing (Broder 1997; datasketch) proposes anchors that may
be near; each proposal is then compared in full, so what is found is true, and what is missed is missed by chance: of
pairs of anchors at a similarity of 0.8, 1 in 1,500 with these bands.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from datasketch import MinHash, MinHashLSH
from xxhash import xxh32_intdigest

from tercet.data.row_checks import normalise

SIMILARITY = 0.8
PIECE_CHARS = 5
# Two texts of similarity s meet in one of BANDS bands of ROWS hashes with probability 1 - (1 - s^ROWS)^BANDS.
BANDS, ROWS = 24, 6

_min_hashes = partial(MinHash.generator, num_perm=BANDS * ROWS, seed=1, hashfunc=xxh32_intdigest, scheme="affine32")


class NearCopies:
    """Rows, to be found by near copies of them. Holds their texts, and about 5 kB a row beside them."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str]] = []
        self._index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, anchors: Iterable[str], positives: Iterable[str]) -> None:
        """Take rows in; they are numbered from 0 in the order of their coming."""
        new = list(zip(map(_folded, anchors), map(_folded, positives), strict=True))
        for number, signature in enumerate(_min_hashes(_bytes_of(anchor) for anchor, _ in new)):
            self._index.insert(len(self._rows) + number, signature, check_duplication=False)
        self._rows += new

    def find(self, anchors: Iterable[str], positives: Iterable[str]) -> list[list[int]]:
        """For each row that is asked for, the numbers of its near copies."""
        if not self._rows:
            return [[] for _ in anchors]
        asked = list(zip(map(_folded, anchors), map(_folded, positives), strict=True))
        signatures = _min_hashes(_bytes_of(anchor) for anchor, _ in asked)
        return [
            sorted(number for number in self._index.query(signature) if _near(row, self._rows[number]))
            for row, signature in zip(asked, signatures, strict=True)
        ]


def _near(row: tuple[str, str], other: tuple[str, str]) -> bool:
    return all(a == b or jaccard(a, b) >= SIMILARITY for a, b in zip(row, other, strict=True))


def jaccard(text: str, other: str) -> float:
    """Share of the pieces of either text that are in both."""
    pieces, others = _pieces(text), _pieces(other)
    return len(pieces & others) / len(pieces | others)


def _folded(text: str) -> str:
    return normalise(normalise(text).casefold())


def _pieces(text: str) -> set[str]:
    return {text[start : start + PIECE_CHARS] for start in range(max(len(text) - PIECE_CHARS + 1, 1))}


def _bytes_of(text: str) -> list[bytes]:
    return [piece.encode() for piece in _pieces(text)]
