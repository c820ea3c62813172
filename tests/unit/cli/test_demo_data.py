"""The demo's rows are many, good, and the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tercet.cli import demo_data
from tercet.cli.demo_data import NUM_ROWS, stdlib_triplets, write_triplets
from tercet.data.build import build_version
from tercet.data.ingest import IngestOptions
from tercet.data.row_checks import problem_of
from tercet.errors import TercetError
from tercet.storage import open_storage

COLUMNS = ("anchor", "positive", "negative", "group")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return stdlib_triplets()


def test_rows_are_many_and_pass_all_checks(rows: list[dict[str, str]]) -> None:
    assert len(rows) == NUM_ROWS == 4500
    assert len({row["group"] for row in rows}) > 200
    assert [row for row in rows if tuple(row) != COLUMNS or problem_of(row, COLUMNS, 10_000)] == []
    assert len({(row["anchor"], row["positive"]) for row in rows}) == len(rows)


def test_a_known_row(rows: list[dict[str, str]]) -> None:
    (row,) = [row for row in rows if row["positive"] == "heapq.heappop(heap)"]
    assert row["anchor"] == "Pop the smallest item off the heap, maintaining the heap invariant."
    assert row["group"] == "heapq"


def test_a_negative_is_a_sibling_that_the_anchor_does_not_describe(rows: list[dict[str, str]]) -> None:
    true = {(row["anchor"], row["positive"]) for row in rows}
    assert [row for row in rows if (row["anchor"], row["negative"]) in true] == []
    for row in rows:
        assert row["negative"].removeprefix("class ").startswith(f"{row['group']}.")


def test_rows_are_the_same_in_another_process(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    code = (
        "from pathlib import Path; from tercet.cli.demo_data import *; "
        f"print(write_triplets(Path({str(tmp_path / 'r')!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(rows)
    assert [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()] == rows


def test_rows_make_a_version(tmp_path: Path, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "stdlib_triplets", lambda: rows)
    num_rows = write_triplets(tmp_path / "r.jsonl")
    result = build_version(
        [tmp_path / "r.jsonl"], open_storage(str(tmp_path / "s")), "demo", IngestOptions(group="group")
    )
    assert sum(result.manifest.num_rows.values()) == num_rows == len(rows)
    assert result.bad_rows == {}
    assert (result.manifest.num_duplicate_rows, result.manifest.num_leaked_rows) == (0, 0)
    assert min(result.manifest.num_rows.values()) > 200


def test_a_library_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(TercetError, match="no Python sources"):
        stdlib_triplets()
