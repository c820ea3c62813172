"""Order is a pure function of seed and epoch: the same for any number of workers, and for every version of tercet."""

from __future__ import annotations

import hashlib
import itertools
import tracemalloc
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from accelerate import skip_first_batches

from tercet.data import no_duplicates, order
from tercet.data.order import (
    DatasetRows,
    RankBatches,
    balance_by_tokens,
    global_batches,
    mixed_batches,
    num_steps_per_epoch,
    rank_micro_batches,
    share_last_batch,
    shuffled,
    subset,
)
from tercet.errors import TrainingError
from tercet.training.trainer import EpochLoader

SEEDS = range(8)


def repeating_texts(num_rows: int, batch_size: int, seed: int) -> npt.NDArray[np.int64]:
    """Hard but possible: two rows in five have an anchor that is in three of four batches; positives repeat too."""
    rng = np.random.default_rng(seed)
    repeats = max(3 * (num_rows // batch_size) // 4, 1)
    anchors = np.arange(num_rows)
    num_repeating = num_rows * 2 // 5
    anchors[:num_repeating] //= repeats
    anchors[num_repeating:] += num_rows
    positives = 10 * num_rows + rng.integers(0, 4 * num_rows, num_rows)
    return rng.permutation(np.stack([anchors, positives], axis=1)).astype(np.int64)


def all_batches(
    num_rows: int,
    batch_size: int,
    seed: int,
    pass_number: int,
    text_ids: npt.NDArray[np.int64] | None = None,
    dataset: int = 0,
) -> npt.NDArray[np.int64]:
    """Return the batches of a pass: shape (num_steps, batch_size)."""
    of = None if text_ids is None else text_ids.__getitem__
    batches = list(global_batches(num_rows, batch_size, seed, pass_number, of, dataset))
    return np.array(batches, dtype=np.int64).reshape(-1, batch_size)


def no_text_twice(batches: npt.NDArray[np.int64], text_ids: npt.NDArray[np.int64]) -> bool:
    return all(len(np.unique(text_ids[batch])) == text_ids[batch].size for batch in batches)


def sha256(batches: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(batches.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_at_most_once_and_only_whole_batches(num_rows: int, seed: int) -> None:
    batches = all_batches(num_rows, 16, seed, seed % 3)
    assert batches.shape == (num_rows // 16, 16) == (num_steps_per_epoch(num_rows, 16), 16)
    assert len(np.unique(batches)) == batches.size
    assert np.isin(batches, np.arange(num_rows)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch_size", [2, 8, 24])
def test_no_text_is_twice_in_a_batch_and_no_row_in_two_batches(seed: int, batch_size: int) -> None:
    text_ids = repeating_texts(509, batch_size, seed)
    assert not no_text_twice(all_batches(509, batch_size, seed, 0), text_ids), "the data must repeat to mean anything"
    for epoch in range(2):
        batches = all_batches(len(text_ids), batch_size, seed, epoch, text_ids)
        assert batches.shape == (len(text_ids) // batch_size, batch_size)
        assert len(np.unique(batches)) == batches.size
        assert no_text_twice(batches, text_ids)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_batches_are_filled_by_swapping(seed: int) -> None:
    """One anchor must be in exactly one row of every batch, which a shuffle alone never achieves."""
    text_ids = np.stack([np.where(np.arange(40) < 10, 0, np.arange(40)), 100 + np.arange(40)], axis=1)
    batches = all_batches(40, 4, seed, 0, text_ids)
    assert no_text_twice(batches, text_ids)
    assert len(np.unique(batches)) == 40
    assert ((batches < 10).sum(axis=1) == 1).all()


def test_a_row_may_have_one_text_in_two_columns() -> None:
    text_ids = np.stack([np.arange(20), np.arange(20)], axis=1)
    assert len(np.unique(all_batches(20, 5, 0, 0, text_ids))) == 20


@pytest.mark.parametrize("no_duplicates", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
def test_the_same_global_batches_for_any_number_of_workers(
    by_length: bool, mixed: bool, accumulation: int, no_duplicates: bool
) -> None:
    row_tokens = np.random.default_rng(0).integers(20, 900, 240).__getitem__ if by_length else None
    text_ids = repeating_texts(200, 16, 1) if no_duplicates else None
    datasets = [DatasetRows(200, 12, text_ids.__getitem__ if text_ids is not None else None), DatasetRows(40, 3)][
        : 1 + mixed
    ]
    expected = list(mixed_batches(datasets, 16, 42, 3))
    assert len(expected) == 12 + 3 * mixed
    for world_size in (1, 2, 4, 8):
        ranks = []
        for rank in range(world_size):
            sampler = RankBatches(datasets, 16, accumulation, rank, world_size, 42, row_tokens)
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
            # Nor do the rows that meet in one forward pass over all ranks depend on the number of ranks.
            assert forwards == [sorted(part.tolist()) for part in batch.reshape(accumulation, -1)]


# --- a shuffle that is computed position by position ----------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 7, 10, 16, 17, 100, 1023, 50_021])
def test_a_shuffle_has_every_row_once(num_rows: int) -> None:
    for seed in SEEDS:
        rows = shuffled(np.arange(num_rows), num_rows, (seed,))
        assert np.array_equal(np.sort(rows), np.arange(num_rows))
        some = np.array([num_rows - 1, 0])
        assert np.array_equal(shuffled(some, num_rows, (seed,)), rows[some])


def test_all_shuffles_of_four_rows_are_about_equally_frequent() -> None:
    counts = Counter(tuple(shuffled(np.arange(4), 4, (seed,)).tolist()) for seed in range(12_000))
    assert len(counts) == 24
    # Chi-square with 23 degrees of freedom exceeds 49.7 once in a thousand times.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 49.7


def test_every_row_is_in_every_position_about_equally_often() -> None:
    counts = np.zeros((30, 30))
    for seed in range(3000):
        counts[np.arange(30), shuffled(np.arange(30), 30, (seed,))] += 1
    # Chi-square with 841 degrees of freedom exceeds 974 once in a thousand times.
    assert ((counts - 100) ** 2 / 100).sum() < 974


def test_neighbours_do_not_stay_together() -> None:
    rows = shuffled(np.arange(100_000), 100_000, (5,))
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(np.arange(100_000), rows)[0, 1]) < 0.01


# --- blocks, and starting within a pass -----------------------------------------------------------------------------


# Each of 20 anchors is in a fifth of the batches.
FREQUENT = np.stack([np.arange(1000) // 50, 1000 + np.arange(1000)], axis=1)


@pytest.mark.parametrize("text_ids", [None, FREQUENT], ids=["plain", "no duplicates"])
def test_a_pass_of_many_blocks_from_any_step(
    monkeypatch: pytest.MonkeyPatch, text_ids: npt.NDArray[np.int64] | None
) -> None:
    whole = all_batches(1000, 4, 7, 1)
    monkeypatch.setattr(order, "MIN_STEPS_PER_BLOCK", 30)
    monkeypatch.setattr(order, "ROWS_PER_BLOCK", 0)  # 250 steps in blocks of 30
    blocks = all_batches(1000, 4, 7, 1, text_ids)
    assert len(np.unique(blocks)) == 1000
    if text_ids is None:
        assert np.array_equal(blocks, whole)
    else:
        assert not no_text_twice(whole, text_ids)
        assert no_text_twice(blocks, text_ids)
    of = None if text_ids is None else text_ids.__getitem__
    for start in (0, 1, 29, 30, 31, 60, 119, 249, 250):
        rest = list(global_batches(1000, 4, 7, 1, of, start_step=start))
        assert np.array_equal(np.array(rest).reshape(-1, 4), blocks[start:])


def test_starting_within_a_pass_makes_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MIN_STEPS_PER_BLOCK", 30)
    monkeypatch.setattr(order, "ROWS_PER_BLOCK", 0)
    looked_at = []

    def text_ids(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        looked_at.append(len(rows))
        return np.stack([rows, 1000 + rows], axis=1)

    next(global_batches(1003, 4, 7, 1, text_ids, start_step=200))
    assert looked_at == [120]
    next(global_batches(1003, 4, 7, 1, text_ids, start_step=245))
    assert looked_at == [120, 43]  # 40 rows of the last block, and the three skipped ones


def test_memory_does_not_grow_with_the_dataset() -> None:
    tracemalloc.start()
    batch = next(global_batches(10**12, 1024, 0, 0, start_step=500_000_000))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(batch)) == 1024
    assert batch.max() > 9 * 10**11
    assert peak_bytes < 50e6


@pytest.mark.parametrize("seed", SEEDS)
def test_an_epoch_of_a_mix_from_any_step(seed: int) -> None:
    datasets = mix((80, 1), (40, 0.4), (56, 2))
    for epoch in range(3):
        whole = list(mixed_batches(datasets, 8, seed, epoch))
        for start in range(0, len(whole) + 1, 5):
            assert np.array_equal(list(mixed_batches(datasets, 8, seed, epoch, start)), whole[start:])


def test_a_resumed_run_skips_steps_without_computing_their_rows() -> None:
    """Resumes as transformers does: accelerate wraps the sampler, and transformers sets the epoch."""

    def loader() -> tuple[RankBatches, EpochLoader]:
        sampler = RankBatches([DatasetRows(64, 8)], 8, 2, 1, 2, 42)
        return sampler, EpochLoader(list(range(64)), batch_sampler=sampler, collate_fn=list)

    sampler, whole = loader()
    whole.set_epoch(3)
    expected = list(whole)
    sampler, resumed = loader()
    sampler.skip(5)
    rest = skip_first_batches(resumed, 5 * 2)
    sampler.set_epoch(3)
    assert len(expected) == 16
    assert list(rest) == expected[10:]
    whole.set_epoch(4)
    sampler.set_epoch(4)
    assert list(resumed) == list(whole)  # the next epoch is whole again


def test_ranks_take_slices_in_order() -> None:
    parts = [rank_micro_batches(np.arange(8), rank, 2, 2).tolist() for rank in range(2)]
    assert parts == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_ranks_take_about_equally_many_tokens() -> None:
    """Lengths have the tail of real texts: the longest of 16 rows is as long as four others."""
    draw = np.random.default_rng(0)
    in_order, by_length = [], []
    for _ in range(100):
        sizes = draw.lognormal(5, 0.7, 128).astype(np.int64)
        for shares, waits in ((balance_by_tokens(sizes, 8), by_length), (np.arange(128).reshape(8, 16), in_order)):
            assert sorted(shares.ravel().tolist()) == list(range(128))
            sums = sizes[shares].sum(axis=1)
            waits.append(sums.max() / sums.mean())
    assert np.median(in_order) > 1.2  # the slowest rank has 20 % more than the mean
    assert np.median(by_length) < 1.01


@pytest.mark.parametrize("text_ids", [None, repeating_texts(300, 4, 0)], ids=["plain", "no duplicates"])
def test_epochs_and_seeds_differ_and_repeat(text_ids: npt.NDArray[np.int64] | None) -> None:
    orders = [sha256(all_batches(300, 4, seed, epoch, text_ids)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    again = [sha256(all_batches(300, 4, seed, epoch, text_ids)) for seed in range(5) for epoch in range(5)]
    assert again == orders
    left_out = [set(range(300)) - set(all_batches(300, 32, 0, epoch).ravel().tolist()) for epoch in range(4)]
    assert len({frozenset(rows) for rows in left_out}) == 4  # other rows in each epoch


def test_too_many_repeats_are_refused_with_a_hint() -> None:
    text_ids = np.stack([np.zeros(8, dtype=np.int64), np.arange(1, 9)], axis=1)  # one anchor for all
    with pytest.raises(TrainingError, match="8 rows in 4 batches of 2 without a text twice") as caught:
        all_batches(8, 2, 0, 0, text_ids)
    assert "training.no_duplicates=false" in caught.value.hint
    assert all_batches(8, 2, 0, 0).shape == (4, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("num_frequent", "num_repeats"), [(29, 0), (30, 1), (38, 9)])
def test_a_text_in_slightly_more_rows_than_batches_is_repeated_as_little_as_possible(
    seed: int, num_frequent: int, num_repeats: int, caplog: pytest.LogCaptureFixture
) -> None:
    """928 rows in 29 batches: a text in more than 29 rows must be repeated."""
    batches = all_batches(928, 32, seed, 0, one_frequent_text(928, num_frequent))
    assert len(np.unique(batches)) == 928
    assert int(((batches < num_frequent).sum(axis=1) - 1).sum()) == num_repeats
    assert [record.getMessage().split(":")[0] for record in caplog.records] == (
        [f"{num_repeats} of 928 rows repeat a text of their batch"] if num_repeats else []
    )
    assert sha256(batches) == sha256(all_batches(928, 32, seed, 0, one_frequent_text(928, num_frequent)))


@pytest.mark.parametrize("seed", SEEDS)
def test_searching_all_batches_together_finds_the_same_order_as_one_by_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = [(repeating_texts(509, size, seed), size) for size in (2, 8)]
    for texts, batch_size in (*hard, (one_frequent_text(928, 120), 8)):  # in 116 batches
        orders = []
        for num_first_tried in (0, 3, len(texts)):
            monkeypatch.setattr(no_duplicates, "NUM_FIRST_TRIED", num_first_tried)
            orders.append(sha256(all_batches(len(texts), batch_size, seed, 0, texts)))
        assert len(set(orders)) == 1


def test_more_than_one_percent_of_repeats_is_refused() -> None:
    with pytest.raises(TrainingError, match="more than 1% of the rows repeat"):
        all_batches(928, 32, 0, 0, one_frequent_text(928, 39))


def one_frequent_text(num_rows: int, num_frequent: int) -> npt.NDArray[np.int64]:
    """The first rows have the same positive; no other text occurs twice."""
    rows = np.arange(num_rows)
    return np.stack([rows + 1, np.where(rows < num_frequent, 0, rows + 1 + num_rows)], axis=1)


def test_subset_is_stable_sorted_and_chosen_by_the_seed() -> None:
    assert subset(10, None, 1).tolist() == list(range(10)) == subset(10, 10, 1).tolist() == subset(10, 99, 1).tolist()
    chosen = subset(1000, 50, 42)
    assert len(set(chosen.tolist())) == 50
    assert (np.diff(chosen) > 0).all()
    assert chosen.tolist() == subset(1000, 50, 42).tolist() != subset(1000, 50, 43).tolist()
    assert set(chosen.tolist()) < set(subset(1000, 100, 42).tolist())  # a larger subset keeps the rows of a smaller one


def mix(*parts: tuple[int, float], batch_size: int = 8) -> list[DatasetRows]:
    """Return datasets with the given numbers of rows and weights."""
    return [DatasetRows(num_rows, num_steps_per_epoch(num_rows, batch_size, weight)) for num_rows, weight in parts]


def dataset_of(row: int, datasets: list[DatasetRows]) -> int:
    ends = itertools.accumulate(rows.num_rows for rows in datasets)
    return next(number for number, end in enumerate(ends) if row < end)


@pytest.mark.parametrize(
    ("num_rows", "weight", "steps"), [(80, 1, 10), (87, 1, 10), (80, 2.5, 25), (80, 0.34, 3), (80, 0.01, 0), (7, 9, 0)]
)
def test_the_weight_is_the_number_of_passes_per_epoch(num_rows: int, weight: float, steps: int) -> None:
    assert num_steps_per_epoch(num_rows, 8, weight) == steps


@pytest.mark.parametrize("text_ids", [None, repeating_texts(300, 4, 0)], ids=["plain", "no duplicates"])
def test_a_mix_of_one_dataset_has_the_order_of_its_passes(text_ids: npt.NDArray[np.int64] | None) -> None:
    for epoch in range(3):
        of = None if text_ids is None else text_ids.__getitem__
        batches = list(mixed_batches([DatasetRows(300, 75, of)], 4, 42, epoch))
        assert np.array_equal(batches, all_batches(300, 4, 42, epoch, text_ids))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_is_used_as_often_as_its_weight_says(seed: int) -> None:
    datasets = mix((80, 1), (40, 0.4), (56, 2), (24, 1.7))  # 10, 2, 14 and 5 steps per epoch; 10, 5, 7 and 3 per pass
    used: Counter[int] = Counter()
    for epoch in range(8):
        batches = list(mixed_batches(datasets, 8, seed, epoch))
        assert len(batches) == 10 + 2 + 14 + 5
        for batch in batches:
            assert len({dataset_of(row, datasets) for row in batch.tolist()}) == 1
            assert len(set(batch.tolist())) == 8
        owners = Counter(dataset_of(int(batch[0]), datasets) for batch in batches)
        assert owners == {0: 10, 1: 2, 2: 14, 3: 5}
        used.update(row for batch in batches for row in batch.tolist())
        for dataset, (steps, steps_per_pass) in enumerate([(10, 10), (2, 5), (14, 7), (5, 3)]):
            # Batches use all rows, so a pass has every row once. No row is used twice before all are used once.
            expected = (epoch + 1) * steps / steps_per_pass
            counts = {used[row] for row in range(200) if dataset_of(row, datasets) == dataset}
            assert counts <= {int(np.floor(expected)), int(np.ceil(expected))}


def test_every_pass_skips_other_rows() -> None:
    datasets = mix((87, 1), (45, 0.4))
    used = {row for epoch in range(30) for batch in mixed_batches(datasets, 8, 0, epoch) for row in batch.tolist()}
    assert used == set(range(87 + 45))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_text_is_twice_in_a_batch_of_a_mix(seed: int) -> None:
    """Equal row numbers mean different texts in different datasets."""
    texts = [repeating_texts(200, 8, seed), repeating_texts(100, 8, seed)]
    datasets = [DatasetRows(200, 25, texts[0].__getitem__), DatasetRows(100, 6, texts[1].__getitem__)]
    for epoch in range(4):
        for batch in mixed_batches(datasets, 8, seed, epoch):
            dataset = dataset_of(int(batch[0]), datasets)
            assert no_text_twice([batch - 200 * dataset], texts[dataset])  # type: ignore[arg-type]


def test_datasets_of_a_mix_are_shuffled_independently_and_take_turns() -> None:
    datasets = mix((80, 1), (80, 1))
    turns = set()
    for epoch in range(6):
        batches = list(mixed_batches(datasets, 8, 42, epoch))
        first, second = ([batch for batch in batches if (batch[0] >= 80) == dataset] for dataset in (False, True))
        assert np.array_equal(first, all_batches(80, 8, 42, epoch))  # a mix does not change the first dataset's order
        assert not np.array_equal(np.array(first), np.array(second) - 80)
        turns.add(tuple(bool(batch[0] >= 80) for batch in batches))
        again = list(mixed_batches(datasets, 8, 42, epoch))
        assert np.array_equal(batches, again)
    assert len(turns) == 6
    assert tuple([False] * 10 + [True] * 10) not in turns
    assert subset(100, 10, 42, 1).tolist() != subset(100, 10, 42).tolist() == subset(100, 10, 42, 0).tolist()


def test_half_a_pass_continues_in_the_next_epoch() -> None:
    datasets = mix((80, 1), (80, 0.5))
    epochs = [[batch for batch in mixed_batches(datasets, 8, 7, epoch) if batch[0] >= 80] for epoch in range(4)]
    for number in (0, 1):
        whole = all_batches(80, 8, 7, number, dataset=1) + 80
        assert np.array_equal(np.concatenate(epochs[2 * number : 2 * number + 2]), whole)


def test_the_order_never_changes_between_versions() -> None:
    """A run resumes with the rows that it has not seen. Another order would silently repeat some and miss others."""
    text_ids = np.stack([np.arange(1000) // 30, 100 + np.arange(1000) * 7 % 900], axis=1)
    assert {
        "plain": sha256(all_batches(1000, 32, 42, 1))[:16],
        "no duplicates": sha256(all_batches(1000, 16, 42, 1, text_ids))[:16],
        "subset": sha256(subset(1000, 100, 42))[:16],
        "mix": sha256(np.stack(list(mixed_batches(mix((80, 1), (40, 0.4)), 8, 42, 1))))[:16],
        "another draw of a subset": sha256(subset(1000, 100, 42, 1, draw=(3, 5)))[:16],
    } == {
        "plain": "1bd5d499c0bf406f",
        "no duplicates": "75aa0c1526c2ce89",
        "subset": "6ca84638244b4f8a",
        "mix": "37a5bb701d5251e2",
        "another draw of a subset": "140126538a5f196d",
    }


@pytest.mark.parametrize(
    ("balanced", "world_size", "expected"),
    [
        (False, 1, "1bd5d499c0bf406f"),
        (False, 2, "ee577d3ec43ca97b"),
        (False, 4, "2fe0e5f0dd3c601a"),
        (True, 1, "1bd5d499c0bf406f"),
        (True, 2, "b892eb2555fc2a7d"),
        (True, 4, "7202123fbd7bc167"),
    ],
)
def test_the_rows_of_each_rank_never_change_between_versions(balanced: bool, world_size: int, expected: str) -> None:
    row_tokens = (20 + np.arange(1000) * 7919 % 881).__getitem__ if balanced else None
    ranks = []
    for rank in range(world_size):
        sampler = RankBatches([DatasetRows(1000, 31)], 32, 2, rank, world_size, 42, row_tokens)
        sampler.set_epoch(1)
        ranks.append(list(sampler))
    assert sha256(np.array(ranks))[:16] == expected


# --- the last batch of a pass, where it is kept ---------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "sizes"), [(41, [16, 16, 9]), (48, [16, 16, 16]), (9, [9]), (33, [16, 16, 1])])
def test_a_kept_last_batch_has_the_other_rows_of_the_pass(num_rows: int, sizes: list[int]) -> None:
    kept = [*global_batches(num_rows, 16, 42, 3, keeps_last=True)]
    assert [len(batch) for batch in kept] == sizes
    assert sorted(np.concatenate(kept).tolist()) == list(range(num_rows))
    for ours, theirs in zip(kept, global_batches(num_rows, 16, 42, 3), strict=False):
        assert ours.tolist() == theirs.tolist()
    resumed = [*global_batches(num_rows, 16, 42, 3, start_step=len(sizes) - 1, keeps_last=True)]
    assert [batch.tolist() for batch in resumed] == [kept[-1].tolist()]
    assert num_steps_per_epoch(num_rows, 16, keeps_last=True) == len(sizes)


def test_a_kept_last_batch_has_no_text_twice() -> None:
    """Each text is in two rows, so without a trade the last batch would sometimes have both."""
    num_trades = 0
    for pass_number in range(40):
        texts = np.stack([np.arange(90) // 2, 100 + np.arange(90)], axis=1)
        batches = [*global_batches(90, 16, 1, pass_number, texts.__getitem__, keeps_last=True)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(90))
        assert all(len({*texts[batch].ravel().tolist()}) == texts[batch].size for batch in batches)
        last = shuffled(np.arange(80, 90), 90, (1, 0, 0, pass_number))
        num_trades += len({*texts[last].ravel().tolist()}) < texts[last].size
    assert num_trades > 0


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 15])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_a_last_batch(world_size: int, num_rows: int, steps: int, copies: bool) -> None:
    batch = np.arange(100, 100 + num_rows)
    ranks = [[*share_last_batch(batch, rank, world_size, steps, 16 // steps, copies)] for rank in range(world_size)]
    assert sorted(row for micros in ranks for micro in micros for row in micro.own) == batch.tolist()
    for micros in zip(*ranks, strict=True):
        assert all(len(micro) > 0 for micro in micros)  # no rank may be without rows in a forward pass
        assert len({(micro.weight, micro.shares, micro.is_copied) for micro in micros}) == 1
        assert (micros[0].shares is None) == (world_size == 1)
        if world_size > 1 and not copies:
            counted = [micro[:share] for micro, share in zip(micros, micros[0].shares or (), strict=True)]
            if micros[0].weight:
                assert [row for rows in counted for row in rows] == [row for micro in micros for row in micro.own]
    # The mean over micro-batches, of which the trainer divides by all that a whole batch has.
    assert [micro.weight for micro in ranks[0]] == pytest.approx(
        [steps / -(-num_rows // (16 // steps))] * -(-num_rows // (16 // steps))
        + [0] * (steps - -(-num_rows // (16 // steps)))
    )


def test_epochs_continue_where_a_kept_last_batch_ends() -> None:
    """With half a pass an epoch, an epoch may begin or end with the smaller batch."""
    rows = DatasetRows(41, 2, keeps_last=True)
    sizes = [[len(batch) for batch in mixed_batches([rows], 16, 42, epoch)] for epoch in range(3)]
    assert sizes == [[16, 16], [9, 16], [16, 9]]
    batches = RankBatches([rows], 16, 2, 0, 1, 42)
    batches.set_epoch(1)
    assert [len(micro) for micro in batches] == [8, 1, 8, 8]
    assert [micro.weight for micro in batches.handed_out] == [1.0, 1.0, 1.0, 1.0]
