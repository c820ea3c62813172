"""All formats give the same rows; a bad record is a bad row with its line; a bad file is an error that names it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tercet.data import csv_records
from tercet.data.readers import BadRow, Row, iter_rows
from tercet.errors import DataError
from tercet.storage import open_storage

COLUMNS = {"anchor": "question", "positive": "answer"}
ROWS = [
    {"question": 'two\nlines, and "quotes"', "answer": "tab\there", "other": "1"},
    {"question": "日本語 🙂", "answer": "line\r\nend", "other": ""},
    {"question": "plain", "answer": "last", "other": "x"},
]


def _delimited(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


CONTENT: dict[str, Callable[[], bytes]] = {
    ".jsonl": lambda: b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    ".ndjson": lambda: "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    ".json": lambda: json.dumps(ROWS, indent=2).encode(),
    ".csv": lambda: _delimited(","),
    ".tsv": lambda: _delimited("\t"),
    ".parquet": _parquet,
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def _write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def _all(path: Path, columns: dict[str, str] | None = None) -> list[Row | BadRow]:
    return list(iter_rows(path, columns or {"anchor": "a"}))


def _bad(path: Path) -> list[tuple[int, str]]:
    return [(row.line, row.kind) for row in _all(path) if isinstance(row, BadRow)]


def _good(path: Path) -> list[tuple[int, object]]:
    return [(row.line, row.values["anchor"]) for row in _all(path) if isinstance(row, Row)]


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("suffix", CONTENT)
def test_all_formats_give_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    path = _write(tmp_path / f"rows{suffix}{compression}", PACK[compression](CONTENT[suffix]()))
    rows = _all(path, COLUMNS)
    assert all(isinstance(row, Row) and row.source == str(path) for row in rows)
    wanted = [{"anchor": row["question"], "positive": row["answer"]} for row in ROWS]
    assert [row.values for row in rows if isinstance(row, Row)] == wanted


@pytest.mark.parametrize(
    ("suffix", "starts"),
    [
        (".jsonl", [1, 2, 3]),
        (".ndjson", [1, 3, 5]),
        (".json", [2, 7, 12]),
        (".csv", [2, 4, 6]),
        (".parquet", [1, 2, 3]),
    ],
)
def test_rows_have_the_number_of_their_first_line(tmp_path: Path, suffix: str, starts: list[int]) -> None:
    assert [row.line for row in _all(_write(tmp_path / f"r{suffix}", CONTENT[suffix]()), COLUMNS)] == starts


def test_bad_jsonl_lines_are_bad_rows(tmp_path: Path) -> None:
    lines_ = [b'{"a": "good"}', b"{oops", b'["a"]', b'{"a": "\xff"}', b"", b'{"b": 1}', b"[" * 100_000, b"1" * 5000]
    path = _write(tmp_path / "r.jsonl", b"\n".join(lines_))
    assert _bad(path)[:4] == [(2, "not_json"), (3, "wrong_type"), (4, "bad_utf8"), (7, "not_json")]
    rows = _all(path)
    assert [row.values for row in rows if isinstance(row, Row)] == [{"anchor": "good"}, {}]
    assert [row.raw for row in rows if isinstance(row, BadRow)][2].encode("utf-8", "surrogateescape") == lines_[3]


def test_an_over_long_line_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "MAX_LINE_BYTES", 40)
    path = _write(tmp_path / "r.jsonl", '{"a": "1"}\n{"a": "' + "x" * 200 + '"}\n{"a": "3"}\n')
    assert (_good(path), _bad(path)) == ([(1, "1"), (3, "3")], [(2, "over_long")])
    path = _write(tmp_path / "r.csv", "a,b\n1,1\n" + "x" * 200 + ',2\n3,"3\n4,4\n' + "y" * 200 + "\n5,5\n")
    assert _bad(path) == [(3, "over_long"), (4, "not_csv"), (6, "over_long")]
    assert _good(path) == [(2, "1"), (5, "4"), (7, "5")]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert _good(_write(tmp_path / "r.csv", b"\xef\xbb\xbfa,b\n1,2\n")) == [(2, "1")]
    assert _good(_write(tmp_path / "r.jsonl", b'\xef\xbb\xbf{"a": "1"}\n')) == [(1, "1")]
    assert _good(_write(tmp_path / "r.json", b'\xef\xbb\xbf[{"a": "1"}]')) == [(1, "1")]


def test_bad_csv_records_are_bad_rows(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.csv", b'a,b\n1,2\n1,2,3\n1\n\n\xff,2\n"7\n7",2\n9,9\n')
    assert _bad(path) == [(3, "wrong_field_count"), (4, "wrong_field_count"), (6, "bad_utf8")]
    assert _good(path) == [(2, "1"), (7, "7\n7"), (9, "9")]


@pytest.mark.parametrize("after", ["", '4,"x, y"\n'])
def test_a_stray_quote_costs_one_record(tmp_path: Path, after: str) -> None:
    many = "".join(f"{number},z\n" for number in range(5000))
    path = _write(tmp_path / "r.csv", f'a,b\n1,2\n2,"never closed\n{many}{after}')
    assert _bad(path) == [(3, "not_csv")]
    assert len(_good(path)) == 5001 + bool(after)


def test_the_search_for_a_closing_quote_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_records, "MAX_FIELD_CHARS", csv.field_size_limit())
    path = _write(tmp_path / "r.csv", 'a,b\n2,"never closed\n' + "3,z\n" * 40_000)
    assert _bad(path) == [(2, "not_csv")]
    assert len(_good(path)) == 40_000


def test_parquet_values_are_checked_one_by_one(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"\xff", None, b"also"])
    text = pa.Array.from_buffers(pa.string(), 4, binary.buffers())
    pq.write_table(pa.table({"a": text}), tmp_path / "r.parquet")
    values = [row.values["anchor"] for row in _all(tmp_path / "r.parquet") if isinstance(row, Row)]
    assert values == ["good", "\udcff", None, "also"]
    pq.write_table(pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "d.parquet")
    assert _good(tmp_path / "d.parquet") == [(1, "x"), (2, "y"), (3, "x")]


def test_a_flipped_bit_in_a_parquet_page_is_an_error(tmp_path: Path) -> None:
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"a": ["some text"] * 99}), tmp_path / "r.parquet", **options)
    data = bytearray((tmp_path / "r.parquet").read_bytes())
    data[data.index(b"some text", 500)] ^= 1
    (tmp_path / "r.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"r\.parquet (cannot be read|is a damaged or incomplete Parquet file): .*CRC"):
        _all(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("r.xml", b"", "r.xml: the file name has no known format", ".jsonl"),
        ("r.gz", b"", "no known format", ".jsonl"),
        ("r.jsonl.gz", gzip.compress(b'{"a": "1"}\n' * 9999)[:-20], "damaged or incomplete .gz", "again"),
        ("r.jsonl.gz", b'{"a": "1"}\n', "damaged or incomplete .gz", "again"),
        (
            "r.jsonl.zst",
            zstandard.ZstdCompressor().compress(b'{"a": "1"}\n' * 9999)[:-9],
            "damaged or incomplete .zst",
            "again",
        ),
        ("r.jsonl.zst", b'{"a": "1"}\n' * 9, "damaged or incomplete .zst", "again"),
        ("r.parquet", b"PAR1 not really", "damaged or incomplete Parquet", "again"),
        ("r.parquet", b"", "damaged or incomplete Parquet", "again"),
        ("r.parquet", _parquet()[:-30], "damaged or incomplete Parquet", "again"),
        ("r.parquet", _parquet(), "no column 'a'", "question, answer"),
        ("r.csv", b"", "no header", ""),
        ("r.csv", b'"a\nb', "no header", ""),
        ("r.csv", b"anchr,A\n1,2\n", "no column 'a'", "Did you mean 'A'"),
        ("r.csv", b"a,a\n1,2\n", "2 columns 'a'", ""),
        ("r.jsonl", b'{"aa": "1"}\n{"bb": "2"}\n', "no row has a column 'a'", "Did you mean 'aa'"),
        ("r.json", b'[{"aa": "1"}]', "no row has a column 'a'", "'aa'"),
        ("r.json", b'{"a": "1"}', ":1: not a JSON array", ".jsonl"),
        ("r.json", b'[\n{"a": "1"},\n{"a": }]', ":3: not JSON", ""),
        ("r.json", b'[{"a": "1"}', "no ',' or ']' after this row", ""),
        ("r.json", b'[{"a": "1"}] more', "after the end", ""),
        ("r.json", b"", "not a JSON array", ""),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, name: str, data: bytes, message: str, hint: str) -> None:
    path = _write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        _all(path)
    assert name in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        _all(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        _all(tmp_path / "folder.jsonl")


def test_a_column_that_only_some_rows_have_is_no_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.jsonl", '{"b": "1"}\n{"a": "2"}\n')
    assert [row.values for row in _all(path) if isinstance(row, Row)] == [{}, {"anchor": "2"}]


def test_an_object_in_storage_is_read_by_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "r.jsonl", '{"a": "1"}\n')
    opened = []

    def open_local(uri: str, endpoint_url: str | None) -> object:
        opened.append((uri, endpoint_url))
        return open_storage(str(tmp_path))

    monkeypatch.setattr("tercet.data.readers.open_storage", open_local)
    (row,) = iter_rows("s3://bucket/folder/r.jsonl", {"anchor": "a"}, endpoint_url="http://server")
    assert row == Row("s3://bucket/folder/r.jsonl", 1, {"anchor": "1"}, '{"a": "1"}')
    assert opened == [("s3://bucket/folder", "http://server")]
    with pytest.raises(DataError, match=r"s3://bucket/folder/none\.csv: no such object"):
        list(iter_rows("s3://bucket/folder/none.csv", {"anchor": "a"}))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    num_rows, text = 20_000, "x" * 500
    if suffix == ".parquet":
        table = pa.table({"a": [f"{number}{text}" for number in range(num_rows)]})
        pq.write_table(table, tmp_path / "r.parquet", compression="none", use_dictionary=False)
        del table
    else:
        one = f"{text}\n" if suffix == ".csv" else f'{{"a": "{text}"}}\n'
        data = (("a\n" if suffix == ".csv" else "") + one * num_rows).encode()
        _write(tmp_path / f"r{suffix}", gzip.compress(data) if suffix.endswith(".gz") else data)
        del data
    tracemalloc.start()
    try:
        num_read = sum(1 for _ in iter_rows(tmp_path / f"r{suffix}", {"anchor": "a"}))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_read == num_rows
    assert peak_bytes < 5_000_000  # the file has 10 MB
