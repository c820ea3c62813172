"""Order is a pure function of seed and epoch: the same for any number of workers, and for every version of tercet."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest

from tercet.errors import TrainingError
from tercet.sampling import RankBatches, global_batches, num_steps_per_epoch, rank_micro_batches, subset

SEEDS = range(8)


def repeating_texts(num_rows: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Hard, but possible: two rows in five have an anchor that is in three batches of four; positives repeat too."""
    rng = np.random.default_rng(seed)
    repeats = max(3 * (num_rows // batch_size) // 4, 1)
    anchors = np.arange(num_rows)
    num_repeating = num_rows * 2 // 5
    anchors[:num_repeating] //= repeats
    anchors[num_repeating:] += num_rows
    positives = 10 * num_rows + rng.integers(0, 4 * num_rows, num_rows)
    return rng.permutation(np.stack([anchors, positives], axis=1)).astype(np.int64)


def no_text_twice(batches: npt.NDArray[np.int64], text_ids: npt.NDArray[np.int64]) -> bool:
    return all(len(np.unique(text_ids[batch])) == text_ids[batch].size for batch in batches)


def sha256(batches: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(batches.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_at_most_once_and_only_whole_batches(num_rows: int, seed: int) -> None:
    batches = global_batches(num_rows, 16, seed, epoch=seed % 3)
    assert batches.shape == (num_rows // 16, 16) == (num_steps_per_epoch(num_rows, 16), 16)
    assert len(np.unique(batches)) == batches.size
    assert np.isin(batches, np.arange(num_rows)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch_size", [2, 8, 24])
def test_no_text_is_twice_in_a_batch_and_no_row_in_two(seed: int, batch_size: int) -> None:
    text_ids = repeating_texts(509, batch_size, seed)
    assert not no_text_twice(global_batches(509, batch_size, seed, 0), text_ids), (
        "the data must repeat to mean anything"
    )
    for epoch in range(2):
        batches = global_batches(len(text_ids), batch_size, seed, epoch, text_ids)
        assert batches.shape == (len(text_ids) // batch_size, batch_size)
        assert len(np.unique(batches)) == batches.size
        assert no_text_twice(batches, text_ids)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_batches_are_filled_by_swapping(seed: int) -> None:
    """One anchor is in exactly one row of every batch: the shuffle alone never gets there."""
    text_ids = np.stack([np.where(np.arange(40) < 10, 0, np.arange(40)), 100 + np.arange(40)], axis=1)
    batches = global_batches(40, 4, seed, 0, text_ids)
    assert no_text_twice(batches, text_ids)
    assert len(np.unique(batches)) == 40
    assert ((batches < 10).sum(axis=1) == 1).all()


def test_rows_that_are_twice_the_same_text_in_themselves() -> None:
    text_ids = np.stack([np.arange(20), np.arange(20)], axis=1)
    assert len(np.unique(global_batches(20, 5, 0, 0, text_ids))) == 20


@pytest.mark.parametrize("no_duplicates", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_same_global_batches_for_any_number_of_workers(accumulation: int, no_duplicates: bool) -> None:
    text_ids = repeating_texts(200, 16, 1) if no_duplicates else None
    expected = global_batches(200, 16, 42, 3, text_ids)
    for world_size in (1, 2, 4, 8):
        ranks = []
        for rank in range(world_size):
            sampler = RankBatches(200, 16, accumulation, rank, world_size, 42, text_ids)
            sampler.set_epoch(3)
            micro_batches = list(sampler)
            assert len(micro_batches) == len(sampler) == len(expected) * accumulation
            assert {len(micro) for micro in micro_batches} == {16 // world_size // accumulation}
            ranks.append(micro_batches)
        for step, batch in enumerate(expected):
            forwards = [
                sorted(itertools.chain(*(ranks[rank][step * accumulation + k] for rank in range(world_size))))
                for k in range(accumulation)
            ]
            # What meets in one forward pass over all ranks, too, does not depend on their number.
            assert forwards == [sorted(part.tolist()) for part in batch.reshape(accumulation, -1)]


def test_ranks_take_slices_in_order() -> None:
    parts = [rank_micro_batches(np.arange(8), rank, 2, 2).tolist() for rank in range(2)]
    assert parts == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize("text_ids", [None, repeating_texts(300, 4, 0)], ids=["plain", "no duplicates"])
def test_epochs_and_seeds_differ_and_repeat(text_ids: npt.NDArray[np.int64] | None) -> None:
    orders = [sha256(global_batches(300, 4, seed, epoch, text_ids)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    again = [sha256(global_batches(300, 4, seed, epoch, text_ids)) for seed in range(5) for epoch in range(5)]
    assert again == orders
    left_out = [set(range(300)) - set(global_batches(300, 32, 0, epoch).ravel().tolist()) for epoch in range(4)]
    assert len({frozenset(rows) for rows in left_out}) == 4  # other rows in each epoch


def test_the_impossible_is_refused_with_a_hint() -> None:
    text_ids = np.stack([np.zeros(8, dtype=np.int64), np.arange(1, 9)], axis=1)  # one anchor for all
    with pytest.raises(TrainingError, match="8 rows in 4 batches of 2 without a text twice") as caught:
        global_batches(8, 2, 0, 0, text_ids)
    assert "training.no_duplicates=false" in caught.value.hint
    assert global_batches(8, 2, 0, 0).shape == (4, 2)


def test_subset_is_stable_sorted_and_chosen_by_the_seed() -> None:
    assert subset(10, None, 1).tolist() == list(range(10)) == subset(10, 10, 1).tolist() == subset(10, 99, 1).tolist()
    chosen = subset(1000, 50, 42)
    assert len(set(chosen.tolist())) == 50
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == subset(1000, 50, 42).tolist() != subset(1000, 50, 43).tolist()
    assert set(chosen.tolist()) < set(subset(1000, 100, 42).tolist())  # a longer try goes on with the same rows


def test_the_order_never_changes_between_versions() -> None:
    """A run resumes with the rows it has not seen yet: another order would silently repeat some and miss others."""
    text_ids = np.stack([np.arange(1000) // 30, 100 + np.arange(1000) * 7 % 900], axis=1)
    assert {
        "plain": sha256(global_batches(1000, 32, 42, 1))[:16],
        "no duplicates": sha256(global_batches(1000, 16, 42, 1, text_ids))[:16],
        "subset": sha256(subset(1000, 100, 42))[:16],
    } == {
        "plain": "96ebe7f885474713",
        "no duplicates": "d240043e8a9f52d4",
        "subset": "365ed218746754ae",
    }
