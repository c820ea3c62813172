"""`layout.PATTERNS`, the functions that make keys, and those that read names out of keys, agree."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest

from tercet.errors import ConfigError, DataError
from tercet.storage import layout

SAMPLES: dict[str, str | int] = {
    "run_id": "2026-11-29-ab12cd34-ef56",
    "incident": "0001-end",
    "step": 8,
    "attempt": "0001-abcd",
    "attempt_folder": "runs/r/checkpoints/00000008/0001-abcd",
    "rank": 1,
    "role": "candidate",
    "data": "test",
    "kind": "queries",
    "dataset": "faq",
    "into": "faq-mined",
    "version": "0123456789abcdef",
    "source": "0123456789abcdef",
    "mining": "89abcdef",
    "model": "faq",
    "generation": 3,
    "number": 2,
    "sha256": "00ff",
    "publisher": "webhook",
}


def makers(suffix: str) -> dict[str, Callable[..., str]]:
    functions = inspect.getmembers(layout, inspect.isfunction)
    return {name: function for name, function in functions if name.endswith(suffix) and not name.startswith("_")}


def made(function: Callable[..., str]) -> str:
    return function(**{name: SAMPLES[name] for name in inspect.signature(function).parameters})


def expression(pattern: str) -> str:
    return re.sub(r"<\w+>", "[^/]+", pattern.replace(".", r"\."))


def fixed_length(pattern: str) -> int:
    return len(re.sub(r"<\w+>", "", pattern))


def pattern_of(key: str) -> str:
    """The most specific pattern that the whole key matches."""
    matching = [pattern for pattern, _ in layout.PATTERNS if re.fullmatch(expression(pattern), key)]
    return max(matching, key=fixed_length)


def test_the_table_is_the_docstring() -> None:
    assert layout.__doc__ is not None
    assert len(layout.PATTERNS) == layout.__doc__.count("\n    ")
    assert all(pattern and purpose and " " not in pattern for pattern, purpose in layout.PATTERNS)
    assert {pattern.split("/")[0] for pattern, _ in layout.PATTERNS} == {layout.RUNS, layout.DATASETS, layout.MODELS}


def test_every_key_has_a_pattern_of_its_own() -> None:
    patterns = {name: pattern_of(made(function)) for name, function in makers("_key").items()}
    assert len({*patterns.values()}) == len(patterns)
    shard = f"{layout.version_prefix('faq', '01')}/{layout.shard_path('train', 0, 3)}"
    files = {pattern for pattern, _ in layout.PATTERNS if pattern.endswith("<file>")}
    assert {*patterns.values(), pattern_of(shard), *files} == {pattern for pattern, _ in layout.PATTERNS}


@pytest.mark.parametrize("name", [*makers("_prefix"), *makers("_folder")])
def test_every_folder_is_part_of_a_pattern(name: str) -> None:
    folder = made(getattr(layout, name))
    assert any(
        re.fullmatch(expression("/".join(pattern.split("/")[: folder.count("/") + 1])), folder)
        for pattern, _ in layout.PATTERNS
    )


def test_names_are_read_back_from_keys() -> None:
    keys = [
        *(layout.plan_key("b"), layout.plan_key("a"), layout.report_key("c"), "runs/a/b/plan.json"),
        *(layout.head_key("faq"), layout.manifest_key("faq", "01"), layout.manifest_key("other", "02")),
        *(layout.model_version_key("m", 12), layout.model_version_key("m", 2), layout.champion_key("n")),
        *(layout.night_key("m", "a"), "models/m/versions/.DS_Store", "models/m/versions/notes.json", "models/stray"),
    ]
    assert layout.run_ids(keys) == ["a", "b"]
    assert layout.dataset_names(keys) == ["faq"]
    assert layout.dataset_version_ids(keys, "faq") == ["01"]
    assert layout.model_names(keys) == ["m"]
    assert layout.model_version_numbers(keys, "m") == [2, 12]
    assert layout.night_run_ids(keys, "m") == ["a"]


def test_the_step_of_a_key() -> None:
    assert layout.step_of(layout.commit_key("r", 8)) == 8
    assert layout.is_commit(layout.commit_key("r", 8))
    folder = layout.attempt_folder("r", 8, "a")
    assert (layout.step_of(folder), layout.is_commit(folder)) == (8, False)
    assert layout.attempt_folder_of(f"{folder}/1_Pooling/config.json") == folder
    assert layout.step_of("runs/r/checkpoints/.DS_Store") is None
    assert layout.step_of("runs/r/checkpoints/notes/a.txt") is None


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "a" * 129])
def test_impossible_names(name: str) -> None:
    with pytest.raises(DataError):
        layout.head_key(name)
    with pytest.raises(ConfigError):
        layout.champion_key(name)
