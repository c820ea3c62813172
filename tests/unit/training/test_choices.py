"""What a run chose when it began is kept, whatever another machine would choose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.errors import CorruptObject, PlanError
from tercet.storage.documents import Document
from tercet.storage.local import LocalStorage
from tercet.training.choices import choose_once

KEY = "runs/r/color.json"


class Color(Document):
    name: str


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def choose(storage: LocalStorage, name: str) -> str:
    return choose_once(storage, KEY, Color, lambda: Color(name=name)).name


def test_the_first_choice_is_kept(storage: LocalStorage) -> None:
    assert [choose(storage, name) for name in ("red", "blue")] == ["red", "red"]


def test_of_two_made_at_the_same_time_the_first_is_kept(storage: LocalStorage) -> None:
    def make() -> Color:
        assert choose(storage, "blue") == "blue"
        return Color(name="red")

    assert choose_once(storage, KEY, Color, make).name == "blue"


def test_a_choice_that_this_machine_cannot_keep_is_refused(storage: LocalStorage) -> None:
    choose(storage, "red")
    with pytest.raises(PlanError, match=r"cannot continue the run as it began \(.*color.json\): no red ink") as caught:
        choose_once(storage, KEY, Color, lambda: Color(name="blue"), lambda color: f"no {color.name} ink")
    assert "choose a new --run-id" in caught.value.hint
    assert choose(storage, "blue") == "red"


def test_a_damaged_choice_is_refused(storage: LocalStorage) -> None:
    choose(storage, "red")
    storage.put(KEY, storage.read(KEY).replace(b"red", b"blu"))
    with pytest.raises(CorruptObject):
        choose(storage, "red")
