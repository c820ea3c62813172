"""A damaged object is refused, or an intact older one is used and reported. None is ever loaded silently."""

from __future__ import annotations

import random
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest

from support import tiny_model
from support.damage import DAMAGES, GOOD, OUTCOMES, Run, trial
from support.interrupted_run import settings

NUM_TRIALS = 60


@pytest.fixture
def run(whole: dict[int, str], store: Path, model: Path, triplets_file: Path, tmp_path: Path) -> Run:
    recipe = tiny_model.write_recipe(tmp_path / "recipe.yaml", model, store, **settings(2))
    return Run(tmp_path / "run", store, whole[2], recipe, triplets_file)


def test_damage_to_an_object_of_each_kind_is_noticed(run: Run, tmp_path: Path) -> None:
    kinds, rng = sorted(run.objects(run.folder / "store", run.folder / "cache")), random.Random(1)
    chosen = list(zip(kinds, cycle(DAMAGES)))
    trials = [trial(run, rng, tmp_path / "scratch", kind_and_damage) for kind_and_damage in chosen]
    assert [found for found in trials if found.outcome not in GOOD] == []
    assert {damage for _, damage in chosen} == set(DAMAGES)


@pytest.mark.soak
def test_no_damage_goes_unnoticed(run: Run, tmp_path: Path) -> None:
    rng = random.Random(0)
    trials = [trial(run, rng, tmp_path / "scratch") for _ in range(NUM_TRIALS)]
    assert [one for one in trials if one.outcome not in GOOD] == []
    assert {one.outcome for one in trials} == set(GOOD) <= set(OUTCOMES)
    assert {one.damage for one in trials} == set(DAMAGES)
    assert min(Counter(one.kind for one in trials).values()) >= 1
