"""Read raw rows from JSONL, JSON arrays, CSV, TSV and Parquet: plain, gzip or zstd; local or in object storage.

A row that cannot be read becomes a `BadRow`, never an exception. A file that cannot be read raises a `DataError` that
names it. Memory does not grow with the file, except for JSON arrays, which are read whole.
"""

from __future__ import annotations

import difflib
import fnmatch
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tercet.data.csv_records import MAX_LINE_BYTES, TooLong, csv_records, decode, read_line
from tercet.data.row_checks import BadKind, is_valid_unicode
from tercet.errors import BucketNotFound, ConfigError, DataError, ObjectNotFound
from tercet.storage import open_storage
from tercet.storage.base import expand_home

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")


class Row(NamedTuple):
    """A row as it was read. `row_checks.problem_of` decides whether its values are good."""

    source: str
    line: int
    """First line of the record, from 1; for Parquet, the row number, from 1."""
    values: dict[str, object]
    """Values by tercet's column names. A column that the row does not have is absent."""
    raw: str
    """The record's text in the file; empty for Parquet."""


class BadRow(NamedTuple):
    """A record that cannot be read as a row."""

    source: str
    line: int
    kind: BadKind
    detail: str
    raw: str


def iter_rows(
    source: str | Path, columns: Mapping[str, str], *, name: str | None = None, endpoint_url: str | None = None
) -> Iterator[Row | BadRow]:
    """Yield the rows of one file, given as a path or an `s3://` URI.

    `columns` maps tercet's column names to the file's. Other columns and empty lines are ignored. `name` replaces the
    source's name in errors and rows. The file's name decides its format.

    Raises DataError if the file is missing, damaged or of an unknown format, or if a column is missing from the header
    or from every row.
    """
    name = name or str(source)
    suffix, compression = format_of(str(source))
    with local_copy(source, endpoint_url) as path:
        try:
            if suffix == ".parquet":
                with _unpacked(path, compression) as plain_path:
                    yield from _parquet_rows(plain_path, name, columns)
            else:
                readers = {".json": _json_rows, ".csv": _csv_rows, ".tsv": _tsv_rows}
                reader: Callable[..., Iterator[Row | BadRow]] = readers.get(suffix, _jsonl_rows)
                with _opened(path, compression) as stream:
                    yield from reader(stream, name, columns)
        except FileNotFoundError as error:
            raise DataError(f"{name}: no such file", "Check the path; it is relative to the working folder.") from error
        except IsADirectoryError as error:
            raise DataError(f"{name} is a folder", "Name its files one by one.") from error
        except PermissionError as error:
            raise DataError(f"{name}: no permission to read it", "Check its owner and mode.") from error
        except (OSError, EOFError, zlib.error) as error:
            problem = f"is a damaged or incomplete {compression} file" if compression else "cannot be read"
            raise DataError(f"{name} {problem}: {error}", "Copy or export the file again.") from error


def format_of(name: str) -> tuple[str, str]:
    """Return (format, compression) by a file's name, e.g. (".csv", ".gz"). Raises DataError for an unknown format."""
    stem, compression = name.lower(), ""
    for suffix in COMPRESSIONS:
        if stem.endswith(suffix):
            stem, compression = stem[: -len(suffix)], suffix
    for suffix in FORMATS:
        if stem.endswith(suffix):
            return suffix, compression
    hint = f"Known formats: {', '.join(FORMATS)}; each may be followed by {' or '.join(COMPRESSIONS)}."
    raise DataError(f"{name}: the file name has no known format", hint)


@contextmanager
def local_copy(source: str | Path, endpoint_url: str | None = None) -> Iterator[Path]:
    """Give a local path of the source: the file itself, or a temporary download of an object."""
    if "://" not in str(source):
        yield Path(source)
        return
    folder_uri, _, key = str(source).rpartition("/")
    with tempfile.TemporaryDirectory(prefix="tercet-source-") as folder:
        path = Path(folder) / key
        try:
            open_storage(folder_uri, endpoint_url).download(key, path)
        except (ObjectNotFound, BucketNotFound) as error:
            raise DataError(f"{source}: no such object", "Check the bucket, the key and the endpoint.") from error
        yield path


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    if compression == ".zst":
        import pyarrow as pa  # reads zstd, which Python itself does not before 3.14

        with path.open("rb") as packed, pa.input_stream(packed, compression="zstd") as unpacked:
            yield io.BufferedReader(unpacked, 1 << 20)
        return
    with path.open("rb") as plain:
        yield plain if compression != ".gz" else gzip.GzipFile(fileobj=plain)  # type: ignore[misc]


@contextmanager
def _unpacked(path: Path, compression: str) -> Iterator[Path]:
    if not compression:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tercet-source-") as folder:
        plain_path = Path(folder) / "plain.parquet"
        with _opened(path, compression) as packed, plain_path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        yield plain_path


def _jsonl_rows(stream: IO[bytes], name: str, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    picker = _ColumnPicker(name, columns)
    number = 0
    while True:
        number += 1
        try:
            line = read_line(stream)
        except TooLong:
            yield BadRow(name, number, "over_long", f"a line of more than {MAX_LINE_BYTES:,} bytes", "")
            continue
        if not line:
            break
        text = decode(line, first=number == 1).rstrip("\r\n")
        if text.strip():
            yield _json_row(name, number, text, None, picker)
    picker.check()


def _json_rows(stream: IO[bytes], name: str, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    text = decode(stream.read(), first=True)
    picker = _ColumnPicker(name, columns)
    parse = json.JSONDecoder().raw_decode
    at, line, counted = 0, 1, 0

    def damaged(what: str) -> DataError:
        hint = "A .json file must hold one array of objects. Name a file with one object per line .jsonl."
        return DataError(f"{name}:{line}: {what}", hint)

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    at = skip(0)
    if text[at : at + 1] != "[":
        raise damaged("not a JSON array")
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = parse(text, at)
        except (ValueError, RecursionError) as error:
            raise damaged(f"not JSON: {error}") from error
        yield _json_row(name, line, text[at:end], value, picker)
        at = skip(end)
        if text[at : at + 1] not in (",", "]") or at >= len(text):
            raise damaged("no ',' or ']' after this row")
        at = skip(at + 1) if text[at] == "," else at
    if skip(at + 1) < len(text):
        raise damaged("text after the end of the array")
    picker.check()


def _json_row(name: str, line: int, text: str, value: object, picker: _ColumnPicker) -> Row | BadRow:
    if not is_valid_unicode(text):
        return BadRow(name, line, "bad_utf8", "bytes that are not UTF-8", text)
    if value is None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return BadRow(name, line, "not_json", str(error), text)
    if not isinstance(value, dict):
        return BadRow(name, line, "wrong_type", f"a row must be a JSON object, not {type(value).__name__}", text)
    return Row(name, line, picker.pick(value), text)


def _csv_rows(stream: IO[bytes], name: str, columns: Mapping[str, str], delimiter: str = ",") -> Iterator[Row | BadRow]:
    records = csv_records(stream, delimiter)
    _, header, _, problem = next(records, (1, [], "", None))
    if problem is not None or not header:
        raise DataError(f"{name}: no header: {problem.detail if problem else 'the file is empty'}", "Add a header.")
    header = [field.strip() for field in header]
    for column in columns.values():
        if header.count(column) != 1:
            count = header.count(column) or "no"
            what = f"{name}: the header has {count} column{'s' if header.count(column) > 1 else ''} {column!r}"
            raise _no_column(what, column, header)
    positions = {column: header.index(in_file) for column, in_file in columns.items()}
    for line, fields, raw, problem in records:
        if problem is None and not is_valid_unicode(raw):
            yield BadRow(name, line, "bad_utf8", "bytes that are not UTF-8", raw)
        elif problem is not None:
            yield BadRow(name, line, problem.kind, problem.detail, raw)
        elif len(fields) != len(header):
            detail = f"{len(fields)} fields, the header has {len(header)}"
            yield BadRow(name, line, "wrong_field_count", detail, raw)
        else:
            yield Row(name, line, {column: fields[position] for column, position in positions.items()}, raw)


def _tsv_rows(stream: IO[bytes], name: str, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    return _csv_rows(stream, name, columns, delimiter="\t")


def _parquet_rows(path: Path, name: str, columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file:
            header = file.schema_arrow.names
            for column in columns.values():
                if column not in header:
                    raise _no_column(f"{name}: no column {column!r}", column, header)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys(columns.values()))):
                values = {column: _parquet_values(batch.column(in_file)) for column, in_file in columns.items()}
                for row in range(batch.num_rows):
                    number += 1
                    yield Row(name, number, {column: values[column][row] for column in columns}, "")
    except pa.ArrowException as error:
        raise DataError(
            f"{name} is a damaged or incomplete Parquet file: {error}", "Copy or export it again."
        ) from error


def _parquet_values(column: Any) -> list[object]:
    """Return Python values. Bytes that are not UTF-8 become surrogates, which `row_checks.problem_of` finds."""
    import pyarrow as pa

    array = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        binary = array.cast(pa.large_binary()).to_pylist()
        return [None if value is None else decode(value) for value in binary]
    return list(array.to_pylist())


class _ColumnPicker:
    """Picks the wanted columns from JSON objects. `check` fails if one of them was in no object."""

    def __init__(self, name: str, columns: Mapping[str, str]) -> None:
        self._name = name
        self._items = tuple(columns.items())
        self._unseen = set(columns.values())
        self._known: dict[str, None] = {}
        self._num_rows = 0

    def pick(self, value: Mapping[str, object]) -> dict[str, object]:
        if self._unseen:
            self._num_rows += 1
            self._unseen -= value.keys()
            if len(self._known) < 1000:
                self._known.update(dict.fromkeys(value))
        return {column: value[in_file] for column, in_file in self._items if in_file in value}

    def check(self) -> None:
        for _, column in self._items:
            if column in self._unseen and self._num_rows:
                raise _no_column(f"{self._name}: no row has a column {column!r}", column, self._known)


def _no_column(message: str, column: str, existing: Iterable[str]) -> DataError:
    names = list(existing)
    lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(column.lower(), lower, 1, 0.4)
    meant = f"Did you mean {lower[close[0]]!r}? " if close else ""
    hint = f"{meant}Columns in the file: {', '.join(names[:20])}. "
    hint += "Name the right ones with --anchor, --positive and --negative, or with nightly.columns. "
    hint += "Use --pairs if there is no negative."
    return DataError(message, hint)


_WILDCARDS = set("*?[")


def find_sources(patterns: Sequence[str], endpoint_url: str | None = None) -> list[str]:
    """Return the files that match patterns such as `incoming/*.jsonl.gz` or `s3://bucket/incoming/*.parquet`, sorted.

    A pattern may match no file. A pattern without a wildcard names a file, whether it exists or not.

    Raises ConfigError if there is a wildcard before the last part, or if a local folder is missing or not readable: it
    might hold new files."""
    sources: set[str] = set()
    for pattern in patterns:
        root, _, name = pattern.rpartition("/")
        if not set(pattern) & _WILDCARDS:
            sources.add(pattern)
        elif set(root) & _WILDCARDS:
            raise ConfigError(f"{pattern}: only the last part may have wildcards", hint="name each folder")
        elif "://" in pattern:
            keys = open_storage(root, endpoint_url).list("")
            sources.update(f"{root}/{key}" for key in keys if "/" not in key and fnmatch.fnmatchcase(key, name))
        else:
            try:
                files = [path for path in expand_home(pattern).parent.iterdir() if path.is_file()]
            except OSError as error:
                what, hint = f"{pattern}: {error.filename}: {error.strerror}", "check the path, its owner and its mode"
                raise ConfigError(what, hint) from None
            sources.update(str(path) for path in files if fnmatch.fnmatchcase(path.name, name))
    return sorted(sources)
