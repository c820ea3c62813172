"""A sealed document comes back as it was, or not at all."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ConfigDict

from tercet.errors import CorruptObject
from tercet.storage.documents import seal, unseal


class Poem(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    title: str
    lines: tuple[float, ...]


POEM = Poem(title="\u00e9\n", lines=(0.1, 1e-300, 3.0))


def test_it_comes_back_and_is_json() -> None:
    data = seal(POEM)
    assert unseal(Poem, data, "poem") == POEM
    assert {name: value for name, value in json.loads(data).items() if name != "sha256"} == POEM.model_dump(mode="json")


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = seal(POEM)
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptObject, match="poem is damaged"):
                unseal(Poem, bytes(damaged), "poem")
        with pytest.raises(CorruptObject):
            unseal(Poem, data[:place], "poem")
    with pytest.raises(CorruptObject):
        unseal(Poem, data + b" ", "poem")


def test_a_document_of_another_kind() -> None:
    class Song(Poem):
        tune: str

    with pytest.raises(CorruptObject, match="song was not written by this tercet: Field required"):
        unseal(Song, seal(POEM), "song")
