"""The tree of errors in the docstring is the real one, and every error survives pickling."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from tercet import errors
from tercet.errors import TercetError

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if issubclass(item, TercetError)]


def drawn() -> dict[str, tuple[str, int]]:
    """Class → (parent, exit code), from the tree in the module's docstring."""
    tree: dict[str, tuple[str, int]] = {}
    parents: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^ {4}([│ ├└─]*)([A-Z]\w+) +(\d)  ", line):
            depth = len(match[1]) // 4
            parents[depth] = match[2]
            tree[match[2]] = (parents[depth - 1] if depth else "Exception", int(match[3]))
    return tree


def test_the_documented_tree_is_the_real_one() -> None:
    assert drawn() == {item.__name__: (item.__bases__[0].__name__, item.exit_code) for item in CLASSES}


def test_exit_codes_distinguish_the_classes() -> None:
    codes = {item.exit_code for item in CLASSES if item.__bases__[0] is TercetError}
    assert codes == {2, 3, 4, 5, 6, 7}
    assert TercetError.exit_code == 1


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda item: item.__name__)
def test_pickling_keeps_everything(error_class: type[TercetError]) -> None:
    copy = pickle.loads(pickle.dumps(error_class("what happened", hint="what to do")))
    assert type(copy) is error_class
    assert (copy.message, copy.hint, str(copy)) == ("what happened", "what to do", "what happened")
    assert pickle.loads(pickle.dumps(error_class("alone"))).hint == ""


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda item: item.__name__)
def test_every_class_says_what_it_is(error_class: type[TercetError]) -> None:
    assert error_class.__doc__
    assert error_class.__doc__.endswith(".") or error_class is TercetError
