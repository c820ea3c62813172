"""YAML with positions: every value of a recipe has a line and a column.

It differs from YAML 1.1 in two ways, as users expect: `2e-5` is a number, and a repeated key is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tercet.errors import ConfigError, first_line

Loc = tuple[int | str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2."""


# PyYAML follows YAML 1.1, where an exponent needs a dot and a sign: `2e-5` would be a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


# What PyYAML raises for an impossible date, a number of 5,000 digits, `!!bool maybe`, `!!int ""`, `!!timestamp x` and
# an alias to itself.
_BAD_VALUE = (ValueError, LookupError, AttributeError, RecursionError)


@dataclass
class Marks:
    """Position of each value: path of keys → (line, column), both from 1, or the flag that set the value."""

    positions: dict[Loc, tuple[int, int]] = field(default_factory=dict)
    flags: dict[Loc, str] = field(default_factory=dict)

    def position(self, loc: Loc) -> tuple[int, int]:
        """Return the position of the value at `loc`, or of the innermost section above it that has one."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.positions:
                return self.positions[loc[:end]]
        return (1, 1)

    def where(self, loc: Loc, file: str) -> str:
        """Return `file:line:column`, or the flag that set the value."""
        for end in range(len(loc), 0, -1):
            if loc[:end] in self.flags:
                return self.flags[loc[:end]]
        line, column = self.position(loc)
        return f"{file}:{line}:{column}"


def load(path: Path) -> tuple[dict[str, Any], Marks]:
    """Read a recipe file.

    Raises ConfigError if the file is missing, is not YAML, is not a mapping or has repeated keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}", hint="check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start})", hint="check that this file is a recipe"
        ) from None
    marks = Marks()
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path}:1:1: a recipe is a mapping of sections", hint="`tercet recipe` prints an example"
            )
        duplicates: list[str] = []
        _mark(node, (), marks, duplicates, str(path))
        if duplicates:
            raise ConfigError("\n".join(duplicates), hint="keep one of each")
        document = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not YAML: {getattr(error, 'problem', None) or error}", hint="fix the syntax"
        ) from None
    except _BAD_VALUE as error:
        raise ConfigError(
            f"{path}: a value is not YAML: {first_line(error)}", hint="fix the value, or quote it"
        ) from None
    return document, marks


def _mark(node: yaml.Node, loc: Loc, marks: Marks, duplicates: list[str], file: str) -> None:
    marks.positions.setdefault(loc, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(
                key, yaml.ScalarNode
            ):  # such as an unfilled template, `{{ x }}`: the constructor refuses it
                continue
            here = (*loc, str(key.value))
            marks.positions[here] = (key.start_mark.line + 1, key.start_mark.column + 1)
            if key.value in seen:
                duplicates.append(f"{marks.where(here, file)}: key `{'.'.join(map(str, here))}` is given twice")
            seen.add(key.value)
            _mark(value, here, marks, duplicates, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _mark(value, (*loc, index), marks, duplicates, file)


def override(document: dict[str, Any], marks: Marks, assignment: str) -> None:
    """Apply an assignment `a.b=value` to `document` in place. Raises ConfigError if it does not have that form."""
    dotted, equals, text = assignment.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {assignment}: not of the form section.key=value", hint="write it as in training.seed=7"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, *_BAD_VALUE):
        raise ConfigError(f"--set {assignment}: the value is not YAML", hint="quote the value") from None
    section, flag = document, f"--set {assignment}"
    for depth, key in enumerate(keys[:-1], start=1):
        if isinstance(section.get(key), list):
            raise ConfigError(f"{flag}: {key} is a list", hint="set the whole list, or change the recipe")
        if not isinstance(section.get(key), dict):
            section[key] = {}
            marks.flags[tuple(keys[:depth])] = flag
        section = section[key]
    section[keys[-1]] = value
    marks.flags[tuple(keys)] = flag
