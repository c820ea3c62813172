"""What the benchmarks import exists. None of them runs here: they take minutes to hours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = (REPOSITORY / "src", REPOSITORY / "tests", REPOSITORY / "benchmarks")


def own_file(module: str) -> Path | None:
    """The file of a module of this repository; None for a library's."""
    stems = [root.joinpath(*module.split(".")) for root in ROOTS]
    files = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
    return next((file for file in files if file.exists()), None)


def names_in(file: Path) -> set[str]:
    """What a module has at its top: functions, classes, constants and imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_exists(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (file := own_file(node.module or "")) is not None:
            known = names_in(file)
            missing += [
                f"{node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in known and own_file(f"{node.module}.{alias.name}") is None
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tercet", "support"):
            missing.append(str(node.module))
    assert missing == []
