"""A sealed document is read back exactly, or not at all."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from tercet.errors import CorruptObject
from tercet.storage.documents import Document, seal, sha256, unseal


class Poem(Document):
    title: str
    lines: tuple[float, ...]


class OldPoem(Poem):
    """A kind that was once stored without a seal."""

    once_unsealed: ClassVar[bool] = True


POEM = Poem(title="\u00e9\n", lines=(0.1, 1e-300, 3.0))
OLD_POEM = OldPoem(title="\u00e9\n", lines=(0.1, 1e-300, 3.0))


@pytest.mark.parametrize("poem", [POEM, OLD_POEM])
def test_a_round_trip_and_plain_json(poem: Poem) -> None:
    data = seal(poem)
    assert unseal(type(poem), data, "poem") == poem
    fields = json.loads(data)
    assert list(fields) == ["sha256", "format", "title", "lines"]
    assert fields.pop("sha256") == sha256(data.partition(b"\n")[2])
    assert fields == poem.model_dump(mode="json")


def test_every_flipped_bit_and_every_cut_is_found() -> None:
    data = seal(POEM)
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises(CorruptObject, match="poem is damaged"):
                unseal(Poem, bytes(damaged), "poem")
            with pytest.raises(CorruptObject):
                unseal(OldPoem, bytes(damaged), "poem")
        for kind in (Poem, OldPoem):
            with pytest.raises(CorruptObject):
                unseal(kind, data[:place], "poem")
    for kind in (Poem, OldPoem):
        with pytest.raises(CorruptObject):
            unseal(kind, data + b" ", "poem")


def test_documents_of_older_versions() -> None:
    rest = b' "title": "a",\n "lines": []\n}\n'
    sealed = b'{"sha256": "' + sha256(rest).encode() + b'",\n' + rest
    assert unseal(Poem, sealed, "poem") == Poem(title="a", lines=())
    for plain in (b'{\n "format": 1,\n "title": "a",\n "lines": []\n}', b'{"title": "a", "lines": []}'):
        assert unseal(OldPoem, plain, "poem") == OldPoem(title="a", lines=())
        with pytest.raises(CorruptObject, match="poem is damaged"):
            unseal(Poem, plain, "poem")


def test_a_document_of_another_kind_or_of_a_newer_version() -> None:
    class Song(Poem):
        tune: str

    with pytest.raises(CorruptObject, match="song cannot be read: tune: Field required"):
        unseal(Song, seal(POEM), "song")
    with pytest.raises(CorruptObject, match="poem cannot be read: tune: Extra inputs are not permitted") as caught:
        unseal(Poem, seal(Song(title="a", lines=(), tune="b")), "poem")
    assert "newer tercet" in caught.value.hint
    with pytest.raises(CorruptObject, match="poem cannot be read: format: Input should be 1"):
        unseal(Poem, seal(POEM.model_copy(update={"format": 2})), "poem", hint="restore it")
