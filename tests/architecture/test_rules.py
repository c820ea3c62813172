"""The rules of the tree: wings in order, no circle, and who may import ray, print, or load torch."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tercet
from tercet.storage import layout

SOURCE = Path(tercet.__file__).parent

# The order tells the story: a wing uses only what stands before it.
WINGS = (
    "errors",
    "failpoints",
    "storage",
    "config",
    "data",
    "artifacts",
    "planning",
    "model",
    "evaluation",
    "training",
    "cluster",
    "pipeline",
    "cli",
)
STRANGERS = {"data", "artifacts"}  # stand side by side, and do not know each other

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# Wings that the driver, the controller and the command line load: torch there would cost seconds at each start.
WITHOUT_TORCH = {*WINGS} - {"model", "evaluation", "training"}

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def module_of(path: Path) -> str:
    """`tercet.data.build` for src/tercet/data/build.py, `tercet.data` for its `__init__.py`."""
    parts = ("tercet", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def wing_of(module: str) -> str:
    return module.split(".")[1]


def imported_modules(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere below `tree`, in functions and under TYPE_CHECKING too."""
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                imported.add(whole if whole in MODULES else node.module)
    return imported


def top_imports(tree: ast.Module) -> set[str]:
    """Top-level packages that are imported when the module is, outside `if TYPE_CHECKING`."""
    nodes: list[ast.stmt] = []
    for node in tree.body:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.append(node)
    body = ast.Module([node for node in nodes if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
    return {name.split(".")[0] for name in imported_modules(body)}


def own_imports(module: str) -> set[str]:
    return {name for name in imported_modules(MODULES[module]) if name in MODULES}


def called(tree: ast.AST) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_every_wing_has_its_place() -> None:
    assert {wing_of(module) for module in MODULES} == {*WINGS}


@pytest.mark.parametrize("module", MODULES)
def test_a_wing_uses_only_the_wings_before_it(module: str) -> None:
    wing = wing_of(module)
    allowed = {*WINGS[: WINGS.index(wing) + 1]} - (STRANGERS - {wing} if wing in STRANGERS else set())
    assert {name for name in own_imports(module) if wing_of(name) not in allowed} == set()


def test_no_circle() -> None:
    try:
        order = list(TopologicalSorter({module: own_imports(module) for module in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")
    assert len(order) == len(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) != "cluster"])
def test_ray_is_imported_in_cluster_alone(module: str) -> None:
    assert not {name for name in imported_modules(MODULES[module]) if name.split(".")[0] == "ray"}


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) != "cli"])
def test_the_command_line_alone_prints_and_exits(module: str) -> None:
    # A process that hangs cannot be ended from outside of the thread that noticed.
    allowed = {"tercet.training.guards": ["os._exit"]}
    calls = [name for name in called(MODULES[module]) if name in ("print", "sys.exit", "exit", "quit", "os._exit")]
    assert calls == allowed.get(module, [])
    assert "SystemExit" not in {node.id for node in ast.walk(MODULES[module]) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module) in WITHOUT_TORCH])
def test_what_the_driver_loads_does_not_import_torch_at_the_top(module: str) -> None:
    heavy = {"torch", "transformers", "sentence_transformers", "accelerate", "deepspeed", "peft"}
    assert top_imports(MODULES[module]) & heavy == set()


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of the nodes that are docstrings, or strings that describe the field above them."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tercet.storage.layout"])
def test_keys_are_built_in_layout_alone(module: str) -> None:
    folders = tuple(f"{folder}/" for folder in (layout.RUNS, layout.DATASETS, layout.MODELS))
    names = {pattern.rpartition("/")[2] for pattern, _ in layout.PATTERNS}
    endings = tuple(f"/{name}" for name in names if "<" not in name)
    texts = [
        node.value
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in docstrings(MODULES[module])
    ]
    assert [text for text in texts if text.startswith(folders) or text.endswith(endings)] == []


def test_frozen_and_section_are_the_only_base_models() -> None:
    direct = [
        node.name
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "BaseModel" in map(ast.unparse, node.bases)
    ]
    assert sorted(direct) == ["Frozen", "Section"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_reads_in_one_go(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    assert ast.get_docstring(ast.parse(text)) or path.name == "__main__.py"


@pytest.mark.parametrize("module", MODULES)
def test_a_function_reads_in_one_go(module: str) -> None:
    too_long = {
        node.name: length
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.FunctionDef) and node.end_lineno
        if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert too_long == {}


@pytest.mark.parametrize("wing", sorted(path.parent.name for path in SOURCE.glob("*/__init__.py")))
def test_a_wing_names_each_of_its_files(wing: str) -> None:
    docstring = ast.get_docstring(MODULES[f"tercet.{wing}"]) or ""
    listed = re.findall(r"^- `(\w+)`: ", docstring, re.MULTILINE)
    names = [path.stem for path in (SOURCE / wing).glob("*.py") if not path.stem.startswith("__")]
    assert sorted(listed) == sorted(names)


TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_imports_another_test(path: Path) -> None:
    """What several tests use is in `support`, and the fixtures are in a conftest.py."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    tests = {folder.name for folder in TESTS.iterdir() if folder.is_dir()} - {"support"} | {"conftest"}
    found = {name for name in imported if name.split(".")[0] in tests or name.split(".")[-1].startswith("test_")}
    assert found == set()
