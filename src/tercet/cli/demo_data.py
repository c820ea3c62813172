"""Triplets for `tercet demo`, made from data that every machine has: the docstrings of Python's standard library.

The anchor is the first sentence of a docstring. The positive is the name and signature of the function or class that it
describes. The negative is a sibling from the same module. Sources are read with `ast`; nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tercet.errors import TercetError

NUM_ROWS = 4_500
"""Enough to distinguish models, few enough for a demo of minutes on two cores."""
MAX_CHARS = 100
"""Longer sentences and signatures are skipped: they take time and teach nothing more."""
MAX_ROWS_PER_MODULE = 60
"""A split consists of whole modules. Without a limit, tkinter alone would be half of its split."""
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
_SKIPPED_PACKAGES = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
"""Slow to read, with few docstrings, or removed from newer Pythons."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(<*])")


def stdlib_triplets() -> list[dict[str, str]]:
    """Return NUM_ROWS rows of anchor, positive, negative and group.

    One installed Python always gives the same rows in the same order. The group is the module, so that no module is in
    two splits. Takes a few seconds. Raises TercetError if the sources of the standard library are not installed.
    """
    rows = [row for group, path in _modules() for row in _module_rows(group, path)]
    if not rows:
        folder = sysconfig.get_path("stdlib")
        hint = "Use a Python whose standard library is installed as source files."
        raise TercetError(f"no Python sources under {folder}", hint)
    return _sample(rows, NUM_ROWS)


def write_triplets(path: Path) -> int:
    """Write `stdlib_triplets()` as JSONL. Return the number of rows."""
    rows = stdlib_triplets()
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)


def _modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, source file), sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and parts[0] not in _SKIPPED_PACKAGES:
            modules.append((".".join(parts).removesuffix(".__init__"), path))
    return iter(sorted(modules))


def _module_rows(module: str, path: Path) -> list[dict[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    documented = sorted(dict.fromkeys(_documented(module, tree.body)))
    sentences: dict[str, set[str]] = {}
    siblings: dict[str, list[str]] = {"": []}  # by class (or module, for its top level); "" has all
    for sentence, name in documented:
        sentences.setdefault(name, set()).add(sentence)
        siblings.setdefault(_owner(name), []).append(name)
        siblings[""].append(name)
    rows = []
    for anchor, positive in documented:
        others = _rotated(siblings[_owner(positive)], positive) + _rotated(siblings[""], positive)
        negative = next((name for name in others if name != positive and anchor not in sentences[name]), None)
        if negative is not None:
            rows.append({"anchor": anchor, "positive": positive, "negative": negative, "group": module})
    return _sample([row for row in rows if max(map(len, row.values())) <= MAX_CHARS], MAX_ROWS_PER_MODULE)


def _sample(rows: list[dict[str, str]], max_rows: int) -> list[dict[str, str]]:
    """Return at most `max_rows` of the rows, chosen by a hash of their text, in the given order."""
    by_digest = sorted(range(len(rows)), key=lambda index: _digest(rows[index]["positive"] + rows[index]["anchor"]))
    return [rows[index] for index in sorted(by_digest[:max_rows])]


def _rotated(names: list[str], key: str) -> list[str]:
    """Return `names`, rotated to start at a place that a hash of `key` decides."""
    start = _digest(key) % len(names)
    return names[start:] + names[:start]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _documented(prefix: str, body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Yield (first sentence, qualified name with signature) of every documented class, function and method."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):  # platform-specific definitions
            yield from _documented(prefix, node.body)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{node.name}"
            sentence = _first_sentence(ast.get_docstring(node) or "")
            if sentence:
                yield sentence, _signature(name, node)
            if isinstance(node, ast.ClassDef):
                yield from _documented(name, node.body)


def _signature(name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"{name}({ast.unparse(node.args)})"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return f"class {name}({bases})" if bases else f"class {name}"


def _first_sentence(docstring: str) -> str:
    """Return the first sentence on one line; empty if it has fewer than three words."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph)[0]
    return sentence if len(sentence.split()) >= 3 else ""


def _owner(name: str) -> str:
    return name.removeprefix("class ").split("(")[0].rpartition(".")[0]
