"""Every value of a recipe has a line and a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tercet.config import recipe_yaml
from tercet.config.recipe_yaml import Marks
from tercet.errors import ConfigError


def load(tmp_path: Path, text: str | bytes) -> tuple[dict[str, Any], Marks]:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return recipe_yaml.load(path)


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.hint
    return caught.value.message.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("2E+3", 2000.0), ("-1.5e3", -1500.0), (".5e1", 5.0), ("1.0", 1.0), ("7", 7), ("e5", "e5")],
)
def test_numbers_are_read_as_users_expect(tmp_path: Path, text: str, value: object) -> None:
    read = load(tmp_path, f"a: {text}")[0]["a"]
    assert read == value
    assert type(read) is type(value)


def test_marks_are_lines_and_columns_from_one(tmp_path: Path) -> None:
    _, marks = load(tmp_path, "# a comment\na:\n  b: 1\n  c: [x, {d: 2}]\n")
    assert marks.where(("a",), "f") == "f:2:1"
    assert marks.where(("a", "b"), "f") == "f:3:3"
    assert marks.where(("a", "c", 1, "d"), "f") == "f:4:11"
    assert marks.where(("a", "missing", "deep"), "f") == "f:2:1"  # the innermost section that has a position


def test_a_key_given_twice(tmp_path: Path) -> None:
    message = refused(tmp_path, "a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert message == "r.yaml:4:3: key `b.c` is given twice\nr.yaml:5:1: key `a` is given twice"


def test_the_same_key_in_two_sections_is_fine(tmp_path: Path) -> None:
    assert load(tmp_path, "a: {name: 1}\nb: {name: 2}\n")[0] == {"a": {"name": 1}, "b": {"name": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: \xff\n", "r.yaml: not UTF-8 text (byte 6)"),
        ("- a\n- b\n", "r.yaml:1:1: a recipe is a mapping of sections"),
        ("", "r.yaml:1:1: a recipe is a mapping of sections"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2:2: not YAML: expected ',' or ']', but got ':'"),
        ("name: {{ filled_by_nobody }}\n", "r.yaml:1:8: not YAML: found unhashable key"),
        ("a: !!python/object:os.system {}\n", "r.yaml:1:4: not YAML: could not determine a constructor for the tag"),
    ],
)
def test_files_that_are_not_recipes(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the recipe: No such file"):
        recipe_yaml.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read the recipe: Is a directory"):
        recipe_yaml.load(tmp_path)


def test_an_override_changes_or_adds_a_value_and_marks_it() -> None:
    document: dict[str, Any] = {"a": {"b": 1}, "c": 5}
    marks = Marks({("a", "b"): (2, 3)})
    for assignment in ("a.b=2e-5", "c.d=[x, y]", "e=", "f.g=a=b"):
        recipe_yaml.override(document, marks, assignment)
    assert document == {"a": {"b": 2e-5}, "c": {"d": ["x", "y"]}, "e": None, "f": {"g": "a=b"}}
    assert marks.where(("a", "b"), "f") == "--set a.b=2e-5"
    assert marks.where(("c", "d", 0), "f") == "--set c.d=[x, y]"


@pytest.mark.parametrize("assignment", ["a.b", "=1", "a..b=1", ".a=1", "a=[1"])
def test_an_override_of_another_form_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_yaml.override({}, Marks(), assignment)
    assert caught.value.message.startswith(f"--set {assignment}: ")


@pytest.mark.parametrize("value", ["2020-02-30", "!!int abc", "9" * 5000, "!!bool maybe", "!!timestamp x", '!!int ""'])
def test_values_that_yaml_cannot_construct(tmp_path: Path, value: str) -> None:
    assert refused(tmp_path, f"a: {value}\n").startswith("r.yaml")
    with pytest.raises(ConfigError, match="not YAML"):
        recipe_yaml.override({}, Marks(), f"a={value}")


def test_an_alias_to_itself_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "a: &a [*a]\n").startswith("r.yaml")


def test_an_error_in_a_section_that_a_flag_made_names_the_flag(tmp_path: Path) -> None:
    document, marks = load(tmp_path, "a: {b: 1}\nmix: [{c: 1}]\n")
    recipe_yaml.override(document, marks, "x.y=1")
    assert marks.where(("x",), "f") == marks.where(("x", "y"), "f") == "--set x.y=1"
    assert marks.where(("a",), "f") == "f:1:1"
    with pytest.raises(ConfigError, match=r"--set mix.0.c=2: mix is a list"):
        recipe_yaml.override(document, marks, "mix.0.c=2")
    assert document["mix"] == [{"c": 1}]
