"""The file list tells the story: a file uses only what stands above it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tercet

SOURCE = Path(tercet.__file__).parent

README = Path(__file__).parents[2] / "README.md"

# The table of the README, lowest first.
ORDER = ["__init__"] + [
    name
    for line in README.read_text(encoding="utf-8").split("## The files")[1].splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`(\w+)\.py`", line.split("|")[1])
]

# Inside a function only, so that nobody imports it who does not need it.
BACKWARD = {
    ("storage", "s3"): "the one door chooses the kind of storage behind it",
    ("storage", "local_storage"): "likewise",
}

MAX_LINES = 300  # a file reads in one go


def tree(name: str) -> ast.Module:
    return ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))


def imports(node: ast.AST) -> set[str]:
    """The files of tercet that are imported anywhere below `node`."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            if child.module == "tercet":
                found |= {alias.name if alias.name in ORDER else "__init__" for alias in child.names}
            elif child.module and child.module.startswith("tercet."):
                found.add(child.module.removeprefix("tercet."))
        elif isinstance(child, ast.Import):
            found |= {alias.name.removeprefix("tercet.") for alias in child.names if alias.name.startswith("tercet.")}
    return found


def test_every_file_is_in_the_list() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in SOURCE.glob("*.py"))
    assert [path for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"] == [], "it is flat"


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_above(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    allowed = {target for source, target in BACKWARD if source == name}
    assert imports(tree(name)) - above - allowed == set()


@pytest.mark.parametrize(("name", "target"), BACKWARD)
def test_a_backward_import_is_needed_and_inside_a_function(name: str, target: str) -> None:
    at_the_top = [node for node in tree(name).body if isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Try)]
    assert target in imports(tree(name)), f"{name} imports {target} no more: take it off the list"
    assert target not in {found for node in at_the_top for found in imports(node)}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_reads_in_one_go(name: str) -> None:
    num_lines = len((SOURCE / f"{name}.py").read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES


@pytest.mark.parametrize("name", [name for name in ORDER if name != "__init__"])
def test_a_file_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(tree(name))


@pytest.mark.parametrize("name", [name for name in ORDER if not name.endswith("cli")])
def test_only_the_command_line_prints_or_exits(name: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    assert "print" not in calls
    # worker.py is a program of its own, too, under torchrun; guards.py ends a process that hangs.
    exits = [call for call in calls if call in ("sys.exit", "exit", "quit", "os._exit")]
    assert exits == {"worker": ["sys.exit"], "guards": ["os._exit"]}.get(name, [])
