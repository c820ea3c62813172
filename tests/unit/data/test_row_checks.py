"""Every kind of bad row is found, good rows pass, and repeats are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import pytest

from tercet.data.row_checks import BadKind, RepeatCounter, normalise, problem_of, row_hash, text_hash

COLUMNS = ("anchor", "positive", "negative")
GOOD: dict[str, object] = {"anchor": "list files", "positive": "ls -a", "negative": "ls -A"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"negative": None}, "null"),
        ({"positive": 3}, "wrong_type"),
        ({"positive": ["ls"]}, "wrong_type"),
        ({"anchor": ""}, "blank"),
        ({"anchor": " \t\n\u00a0"}, "blank"),
        ({"anchor": "\u200b\ufeff"}, "blank"),
        ({"anchor": b"\xff".decode("utf-8", "surrogateescape")}, "bad_utf8"),
        ({"anchor": "half a pair \ud83d"}, "bad_utf8"),
        ({"positive": "x" * 101}, "over_long"),
        ({"positive": "list  files "}, "anchor_equals_positive"),
        ({"negative": "ls\n-a"}, "positive_equals_negative"),
        ({"negative": "list files"}, "anchor_equals_negative"),
        ({"anchor": "caf\u00e9", "positive": "cafe\u0301"}, "anchor_equals_positive"),
    ],
)
def test_each_kind_is_found(change: Mapping[str, object], kind: str) -> None:
    problem = problem_of({**GOOD, **change}, COLUMNS, max_text_chars=100)
    assert problem is not None
    assert problem.kind == kind
    assert problem.detail


def test_a_missing_column_is_found_and_named() -> None:
    problem = problem_of({"anchor": "a", "positive": "b"}, COLUMNS)
    assert problem is not None
    assert problem.kind == "missing_column"
    assert problem.detail == "the row has no negative"


def test_good_rows_are_good() -> None:
    assert problem_of(GOOD, COLUMNS) is None  # upper and lower case differ
    assert problem_of(GOOD, ("anchor", "positive")) is None
    assert problem_of({**GOOD, "positive": "x" * 100}, COLUMNS, max_text_chars=100) is None
    assert problem_of({**GOOD, "group": "ls -a"}, (*COLUMNS, "group")) is None  # a group may equal a text
    assert problem_of({"anchor": "日本語", "positive": "🙂", "negative": "é"}, COLUMNS) is None


def test_every_negative_is_compared() -> None:
    columns = ("anchor", "positive", "negative", "negative_1")
    problem = problem_of({**GOOD, "negative_1": "ls -a"}, columns)
    assert problem is not None
    assert problem.kind == "positive_equals_negative"
    assert "negative_1" in problem.detail


def test_kinds_are_unique() -> None:
    assert len(set(get_args(BadKind))) == len(get_args(BadKind)) == 12


def test_normalise_keeps_case() -> None:
    assert normalise("  A\u00a0 b\r\nC ") == "A b C"


def test_all_forms_of_a_text_have_one_hash() -> None:
    assert text_hash(" Caf\u00e9  au\nlait") == text_hash("Cafe\u0301 au lait")
    assert len({text_hash(text) for text in ("ls -a", "ls -A", "ls-a", "l s-a")}) == 4


def test_duplicates_and_leaks_are_counted() -> None:
    repeats = RepeatCounter(("train", "eval", "test"))
    repeats.add("train", ["a", "p", "n"])
    repeats.add("train", ["a", "p", "n"])  # a duplicate
    repeats.add("train", ["ap", "", "n"])  # not a duplicate: the boundary between texts matters
    repeats.add("eval", ["a ", " p", "other"])  # leaked, though not a duplicate
    repeats.add("eval", ["b", "p", "n"])
    repeats.add("test", ["b", "p", "n"])  # a duplicate, whose pair is in eval too
    assert repeats.num_duplicate_rows() == 2
    assert repeats.leaked_pairs() == {"train": {row_hash(["a", "p"])}, "eval": {row_hash(["b", "p"])}}


def test_without_rows_nothing_repeats() -> None:
    repeats = RepeatCounter(("train", "eval"))
    assert (repeats.num_duplicate_rows(), repeats.leaked_pairs()) == (0, {})
