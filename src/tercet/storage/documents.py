"""Documents that tell whether they are whole: JSON whose first line is the sha256 of all that follows.

    {"sha256": "9f86d081…",
     "step": 22, …}

A local folder keeps no hashes, and one flipped bit of a JSON document often is another document. Files are checked by
the hashes in these documents; the documents by their own. That they are the right ones is for who reads them to check.
"""

from __future__ import annotations

import hashlib
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tercet.errors import CorruptObject

D = TypeVar("D", bound=BaseModel)


def seal(document: BaseModel) -> bytes:
    """As `unseal` reads it."""
    rest = document.model_dump_json(indent=1).removeprefix("{\n").encode() + b"\n"
    return _first_line(rest) + rest


def unseal(kind: type[D], data: bytes, uri: str, hint: str = "") -> D:
    """The document in `data`. Raises CorruptObject unless every byte is what was sealed; `uri` and `hint` are for its
    message."""
    first, newline, rest = data.partition(b"\n")
    if first + newline != _first_line(rest):
        raise CorruptObject(f"{uri} is damaged: its sha256 is not the one in its first line", hint)
    try:
        return kind.model_validate_json(b"{" + rest)
    except ValidationError as error:
        raise CorruptObject(f"{uri} was not written by this tercet: {error.errors()[0]['msg']}", hint) from error


def _first_line(rest: bytes) -> bytes:
    return b'{"sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode()


class Document(BaseModel):
    """What lies below `models/`. `extra="forbid"`: a field of a newer tercet is an error and not a silent loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    format: Literal[1] = 1


def sha256(data: bytes) -> str:
    """Of a document."""
    return hashlib.sha256(data).hexdigest()


def as_bytes(document: Document) -> bytes:
    """As it is stored."""
    return document.model_dump_json(indent=1).encode()


def parse(kind: type[D], data: bytes, uri: str) -> D:
    """Raises CorruptObject."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptObject(
            f"{uri} cannot be read: {error.errors()[0]['msg']}", hint="a newer tercet may have written it"
        ) from error


def as_json(document: BaseModel) -> bytes:
    """For storage."""
    return document.model_dump_json(indent=1).encode()
