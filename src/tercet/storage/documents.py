"""Documents in storage: JSON whose first line is the sha256 of everything after it.

    {"sha256": "9f86d081…",
     "format": 1,
     "step": 22, …}

A local folder keeps no hashes, and JSON with one flipped bit is often other valid JSON. So each document proves that it
is whole, and holds the hashes of the files that it makes count. It does not prove that it is the document the reader
asked for: the reader compares a name inside it.

Everything that tercet writes and relies on later is a `Document`, written by `seal` and read by `unseal`. The one
exception is a run's events, which are lines.
"""

from __future__ import annotations

import hashlib
from typing import ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tercet.errors import CorruptObject

_SEAL = b'{"sha256": "'


class Frozen(BaseModel):
    """A value made of named fields. An unknown field is an error: a newer tercet wrote it, and it must not get lost."""

    # A field with a better name in code than in storage has the stored name as its alias.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, serialize_by_alias=True
    )


class Document(Frozen):
    """A value that is stored under a key of its own.

    A change that older code would misread raises `format`; documents of the first version of tercet may lack it."""

    once_unsealed: ClassVar[bool] = False
    """Whether tercet once stored this kind as plain JSON. For any other kind, a missing seal is damage."""

    format: Literal[1] = 1


D = TypeVar("D", bound=Document)


def seal(document: Document) -> bytes:
    """Return the bytes to store: JSON of one field a line, after a first line with the sha256 of the rest."""
    rest = document.model_dump_json(indent=1).removeprefix("{\n").encode() + b"\n"
    return _first_line(rest) + rest


def unseal(kind: type[D], data: bytes, uri: str, hint: str = "") -> D:
    """Return the document in `data`, which was read from `uri`.

    Raises CorruptObject, with `hint` as what to do, unless every byte is what was sealed and the fields are those of
    `kind`."""
    if data.startswith(_SEAL) or not kind.once_unsealed:
        first, newline, rest = data.partition(b"\n")
        if first + newline != _first_line(rest):
            raise CorruptObject(f"{uri} is damaged: its sha256 is not the one in its first line", hint)
        data = b"{" + rest
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first_error = error.errors()[0]
        field = ".".join(map(str, first_error["loc"]))
        what = f"{field}: {first_error['msg']}" if field else first_error["msg"]
        raise CorruptObject(
            f"{uri} cannot be read: {what}", hint or "A newer tercet may have written it: upgrade this one."
        ) from error


def sha256(data: bytes) -> str:
    """Return the sha256 of a stored document, as other documents refer to it."""
    return hashlib.sha256(data).hexdigest()


def _first_line(rest: bytes) -> bytes:
    return _SEAL + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
