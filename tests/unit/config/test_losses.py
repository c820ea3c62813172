"""Parameters of each loss in a recipe, the columns that it works with, and its properties."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from tercet.config.losses import UNSUPPORTED_LOSSES, Loss, LossConfig

LOSSES: dict[str, type[Loss]] = {
    get_args(loss.model_fields["name"].annotation)[0]: loss for loss in get_args(get_args(LossConfig)[0])
}
RANKING = "MultipleNegativesRankingLoss"

PAIR = ("anchor", "positive")
TRIPLET = (*PAIR, "negative")
NUMBERED = (*PAIR, "negative_1")
SEVERAL = (*PAIR, "negative_1", "negative_2")

# Whether each loss works with pairs, one negative and several negatives.
TAKES = {
    "TripletLoss": (False, True, False),
    "MultipleNegativesRankingLoss": (True, True, True),
    "CachedMultipleNegativesRankingLoss": (True, True, True),
    "MultipleNegativesSymmetricRankingLoss": (True, True, True),
    "CachedMultipleNegativesSymmetricRankingLoss": (True, True, True),
    "MegaBatchMarginLoss": (True, False, False),
    "GISTEmbedLoss": (True, True, False),
    "CachedGISTEmbedLoss": (True, True, True),
    "AnglELoss": (False, True, True),
}


def made(name: str, **parameters: Any) -> Any:
    guide = {"guide": "some/guide"} if "GIST" in name else {}
    return TypeAdapter(LossConfig).validate_python({"name": name, **guide, **parameters})


def refused(name: str, **parameters: Any) -> dict[str, str]:
    """Validate, and return the last part of each error's position → its message."""
    with pytest.raises(ValidationError) as caught:
        made(name, **parameters)
    return {str(item["loc"][-1]): item["msg"].removeprefix("Value error, ") for item in caught.value.errors()}


def test_the_tables_have_every_loss() -> None:
    assert set(TAKES) == set(LOSSES)
    assert not set(UNSUPPORTED_LOSSES) & set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_the_columns_that_a_loss_works_with(name: str) -> None:
    works = tuple(made(name).column_problem(columns) is None for columns in (PAIR, TRIPLET, SEVERAL))
    assert works == TAKES[name]
    assert (made(name).column_problem(NUMBERED) is None) == TAKES[name][1]


@pytest.mark.parametrize(
    ("name", "columns", "need", "hint"),
    [
        ("TripletLoss", PAIR, "needs a column `negative`", "shard the data with --negative, "),
        ("AnglELoss", PAIR, "needs a column `negative`", "shard the data with --negative, "),
        ("TripletLoss", SEVERAL, "works with one negative per row", "shard the data with one --negative, "),
        ("GISTEmbedLoss", SEVERAL, "works with one negative per row", "shard the data with one --negative, "),
        ("MegaBatchMarginLoss", TRIPLET, "uses only other rows' positives as negatives", "shard the data without "),
    ],
)
def test_columns_that_a_loss_does_not_work_with(name: str, columns: tuple[str, ...], need: str, hint: str) -> None:
    problem = made(name).column_problem(columns)
    assert problem[0] == need
    assert problem[1].startswith(hint)
    advised = [word.strip(",") for word in problem[1].split() if word.strip(",") in LOSSES]
    assert all(made(other).column_problem(columns) is None for other in advised)


def test_hard_negatives_need_a_negative() -> None:
    hard = made(RANKING, hardness_mode="hard_negatives", hardness_strength=5)
    assert hard.column_problem(TRIPLET) is None
    assert hard.column_problem(SEVERAL) is None
    need, hint = hard.column_problem(PAIR)
    assert need == "with hardness_mode=hard_negatives needs a column `negative`"
    assert hint.endswith("set loss.hardness_mode: in_batch_negatives")
    assert made(RANKING, hardness_mode="in_batch_negatives", hardness_strength=9).column_problem(PAIR) is None


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_are_cached(name: str) -> None:
    assert made(name).is_cached == (name.startswith("Cached") or name == "MegaBatchMarginLoss")
    assert not made("MegaBatchMarginLoss", use_mini_batched_version=False).is_cached


@pytest.mark.parametrize("name", LOSSES)
def test_which_losses_gather_across_ranks(name: str) -> None:
    gathers = "gather_across_devices" in LOSSES[name].model_fields
    assert made(name).crosses_ranks == gathers == (name not in ("TripletLoss", "MegaBatchMarginLoss", "AnglELoss"))
    if gathers:
        assert not made(name, gather_across_devices=False).crosses_ranks


@pytest.mark.parametrize("name", [RANKING, f"Cached{RANKING}"])
@pytest.mark.parametrize(
    ("parameters", "place", "message"),
    [
        ({"directions": []}, "directions", "must include query_to_doc: no other direction has the positive"),
        (
            {"directions": ["doc_to_query"]},
            "directions",
            "must include query_to_doc: no other direction has the positive",
        ),
        ({"directions": ["query_to_doc", "query_to_doc"]}, "directions", "must name each direction at most once"),
        (
            {"directions": ["query_to_doc", "doc_to_doc"], "partition_mode": "per_direction"},
            "partition_mode",
            "must be joint with doc_to_doc, where the positive is missing",
        ),
        ({"hardness_mode": "all_negatives"}, "hardness_strength", "must be above 0 with all_negatives"),
        ({"hardness_strength": 1.0}, "hardness_strength", "has no effect without hardness_mode"),
        (
            {"hardness_mode": "all_negatives", "hardness_strength": -1.0},
            "hardness_strength",
            "Input should be greater than or equal to 0",
        ),
    ],
)
def test_impossible_parameters_of_a_ranking_loss(
    name: str, parameters: dict[str, Any], place: str, message: str
) -> None:
    assert refused(name, **parameters) == {place: message}


def test_possible_parameters_of_a_ranking_loss() -> None:
    symmetric = ["query_to_doc", "doc_to_query"]
    assert made(RANKING, directions=symmetric, partition_mode="per_direction").directions == tuple(symmetric)
    four = [*symmetric, "query_to_query", "doc_to_doc"]
    assert made(RANKING, directions=four, hardness_mode="all_negatives", hardness_strength=1).directions == tuple(four)


@pytest.mark.parametrize(
    ("matryoshka", "place", "message"),
    [
        ({"dims": []}, "dims", "Tuple should have at least 1 item after validation, not 0"),
        ({"dims": [8, 4, 8]}, "dims", "8 is given twice"),
        ({"dims": [8, -1]}, "1", "Input should be greater than 0"),
        ({"dims": [8, 4], "weights": [1, 1, 1]}, "weights", "needs one weight for each of the 2 dims, not 3"),
        ({"dims": [8, 4], "weights": [1, 0]}, "1", "Input should be greater than 0"),
        ({"dims": [8, 4], "dims_per_step": 3}, "dims_per_step", "must be at most 2, the number of dims, not 3"),
        ({"dims": [8, 4], "dims_per_step": 0}, "dims_per_step", "Input should be greater than 0"),
        ({"dims": [8, 8], "weights": [1]}, "dims", "8 is given twice"),  # one mistake, one message
    ],
)
@pytest.mark.parametrize("name", ["TripletLoss", "CachedGISTEmbedLoss"])
def test_an_impossible_matryoshka(name: str, matryoshka: dict[str, Any], place: str, message: str) -> None:
    assert refused(name, matryoshka=matryoshka) == {place: message}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_may_have_a_matryoshka(name: str) -> None:
    whole = made(name, matryoshka={"dims": [8, 4], "weights": [1, 0.5], "dims_per_step": 2}).matryoshka
    assert (whole.dims, whole.weights, whole.dims_per_step) == ((8, 4), (1.0, 0.5), 2)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_same_after_a_round_trip_through_json(name: str) -> None:
    loss = made(name, matryoshka={"dims": [8, 4]})
    assert TypeAdapter(LossConfig).validate_json(loss.model_dump_json()) == loss
