"""Which texts share a batch of attention matrices or a padded chunk."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
import torch

from support.reference_groups import slow_attention_groups, slow_chunks
from tercet.model.grouped_attention import MASKED_SCORE, Layout
from tercet.model.text_groups import PAIRS_PER_GROUP, Group, attention_groups, chunks
from tercet.planning.packing import NUM_CHUNKS


def cut(lengths: Sequence[int], places: Sequence[int]) -> tuple[Group, ...]:
    bounds = [0, *places, len(lengths)]
    return tuple(Group(start, stop, lengths[stop - 1]) for start, stop in itertools.pairwise(bounds))


def all_cuts(lengths: Sequence[int]) -> list[tuple[Group, ...]]:
    inner = range(1, len(lengths))
    return [cut(lengths, places) for count in range(len(lengths)) for places in itertools.combinations(inner, count)]


def attention_cost(groups: tuple[Group, ...]) -> int:
    return sum(PAIRS_PER_GROUP + (stop - start) * width**2 for start, stop, width in groups)


def padded_tokens(groups: tuple[Group, ...]) -> int:
    return sum((stop - start) * width for start, stop, width in groups)


def some_lengths() -> list[list[int]]:
    draw = random.Random(0)
    return [sorted(draw.choices(range(1, draw.choice([20, 300])), k=draw.randint(1, 9))) for _ in range(60)]


@pytest.mark.parametrize("lengths", some_lengths())
def test_no_cut_into_groups_costs_less(lengths: list[int]) -> None:
    """Compared with every possible cut."""
    groups = attention_groups(lengths)
    assert groups in all_cuts(lengths)
    assert attention_cost(groups) == min(map(attention_cost, all_cuts(lengths)))


@pytest.mark.parametrize("lengths", some_lengths())
def test_no_cut_into_the_same_number_of_chunks_pads_less(lengths: list[int]) -> None:
    found = chunks(lengths)
    others = [groups for groups in all_cuts(lengths) if len(groups) == min(NUM_CHUNKS, len(lengths))]
    assert found in others
    assert padded_tokens(found) == min(map(padded_tokens, others))


def lengths_of_batches() -> list[list[int]]:
    """Few texts and many, few different lengths and many: equally cheap cuts are frequent among small numbers."""
    draw = random.Random(1)
    small = [
        sorted(draw.choices(range(1, draw.choice([2, 3, 4, 6, 12, 100])), k=draw.randint(1, 14))) for _ in range(1500)
    ]
    large = [sorted(draw.choices(range(1, draw.choice([5, 60, 512])), k=draw.randint(15, 400))) for _ in range(30)]
    return [*small, *large, [*range(1, 900)], [5] * 300 + [6] * 300]


def test_the_cuts_are_those_of_a_search_over_all_texts() -> None:
    for lengths in lengths_of_batches():
        assert chunks(lengths) == slow_chunks(lengths)
        assert attention_groups(lengths) == slow_attention_groups(lengths)


def test_thousands_of_texts_are_cut_in_little_time() -> None:
    """Within a step each text costs less than its tokens. Counted in CPU seconds, with room for a slow machine."""
    draw = random.Random(2)
    lengths = sorted(draw.choices(range(3, 512), k=3072))
    began = time.process_time()
    for _ in range(5):
        chunks(lengths)
        attention_groups(lengths)
    assert time.process_time() - began < 5 * 0.02


def test_similar_lengths_share_a_group_and_others_do_not() -> None:
    assert attention_groups([10, 11, 12, 250]) == (Group(0, 3, 12), Group(3, 4, 250))
    assert attention_groups([64] * 500) == (Group(0, 500, 64),)
    assert attention_groups([1]) == (Group(0, 1, 1),)


def test_the_number_of_chunks_depends_only_on_the_number_of_texts() -> None:
    """Where weights are sharded, all ranks take part in each forward pass, so all must run the same number."""
    for lengths in some_lengths():
        assert len(chunks(lengths)) == min(NUM_CHUNKS, len(lengths))
    assert len(chunks([7] * 100)) == NUM_CHUNKS


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [4, 4], [1, 2, 3, 60], sorted(random.Random(3).choices(range(1, 80), k=40))])
def test_matrices_hold_each_vector_of_their_texts_once(lengths: list[int], num_heads: int) -> None:
    """Row by row: block, text, head, place."""
    matrices = Layout(lengths, torch.device("cpu")).matrices(num_heads)
    first_tokens = [sum(lengths[:text]) for text in range(len(lengths))]
    source, padding, number = [], [], 0
    for block, group in zip(matrices.blocks, attention_groups(lengths), strict=True):
        assert (block.num_texts, block.width) == (group.stop - group.start, group.width)
        assert block.start * num_heads == len(source)
        for text, head, place in itertools.product(
            range(group.start, group.stop), range(num_heads), range(group.width)
        ):
            last = lengths[text] - 1
            source.append((first_tokens[text] + min(place, last)) * num_heads + head)
            padding += [number] if place > last else []
            number += 1
        own = [[[[0.0 if p < lengths[t] else MASKED_SCORE for p in range(group.width)]]] for t in range(*group[:2])]
        if lengths[group.start] == group.width:
            assert block.bias is None
        else:
            assert block.bias is not None
            assert torch.equal(block.bias, torch.tensor(own))
    assert matrices.source.tolist() == source
    assert sorted(matrices.padding.tolist()) == padding
    real = sorted({*range(len(source))} - {*padding}, key=lambda row: source[row])
    assert matrices.back.tolist() == real
