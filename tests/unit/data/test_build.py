"""Raw rows become one version or none: bad rows quarantined, stable splits, the same id for the same rows."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.data.build import BuildResult, build_version
from tercet.data.ingest import IngestOptions, Progress
from tercet.data.manifest import SPLIT_SALT, SPLITS, Manifest, SplitRule
from tercet.data.versions import list_datasets, list_versions, read_head, read_manifest
from tercet.errors import ConfigError, DataError, StorageUnavailable, TercetError, TooManyBadRows
from tercet.storage import Storage, open_storage
from tercet.storage.layout import version_prefix


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


def _rows(numbers: Iterable[int]) -> list[dict[str, Any]]:
    return [
        {"anchor": f"question {n}", "positive": f"answer {n}", "negative": f"other {n}", "topic": f"t{n // 10}"}
        for n in numbers
    ]


def _write(path: Path, rows: Iterable[object]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _contents(storage: Storage, manifest: Manifest, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Return all rows of a version, by split."""
    rows: dict[str, list[dict[str, str]]] = {}
    for split, shards in manifest.splits.items():
        rows[split] = []
        for shard in shards:
            key = f"{version_prefix(manifest.dataset, manifest.version)}/{shard.path}"
            storage.download(key, folder / "shard.parquet", sha256=shard.sha256)
            assert (folder / "shard.parquet").stat().st_size == shard.num_bytes
            table = pq.read_table(folder / "shard.parquet", page_checksum_verification=True)
            assert table.num_rows == shard.num_rows
            rows[split] += table.to_pylist()
    return rows


def test_every_good_row_is_in_one_shard_in_order(tmp_path: Path, storage: Storage) -> None:
    rows = _rows(range(300))
    result = build_version([_write(tmp_path / "r.jsonl", rows)], storage, "faq", IngestOptions(rows_per_shard=50))
    manifest = result.manifest
    contents = _contents(storage, manifest, tmp_path)
    assert set(contents) == set(SPLITS)
    wanted = [{key: row[key] for key in ("anchor", "positive", "negative")} for row in rows]
    for split_rows in contents.values():
        assert split_rows == sorted(split_rows, key=lambda row: int(row["anchor"].split()[1]))
    assert sorted(map(str, chain(*contents.values()))) == sorted(map(str, wanted))
    assert manifest.num_rows == {split: len(contents[split]) for split in SPLITS}
    assert manifest.num_rows["train"] > 200
    assert [shard.num_rows for shard in manifest.splits["train"]][:-1] == [50] * (len(manifest.splits["train"]) - 1)
    assert manifest.splits["train"][0].path == f"shards/train-00000-of-{len(manifest.splits['train']):05d}.parquet"
    assert manifest.text_statistics["anchor"].max_chars == len("question 299")
    assert manifest.text_statistics["positive"].mean_chars == round(
        sum(len(f"answer {n}") for n in range(300)) / 300, 2
    )
    assert (manifest.sources[0].num_rows, manifest.bad_rows) == (300, {})
    assert read_manifest(storage, "faq") == manifest


def test_parquet_is_zstd_with_page_checksums(tmp_path: Path, storage: Storage) -> None:
    manifest = build_version([_write(tmp_path / "r.jsonl", _rows(range(300)))], storage, "faq").manifest
    key = f"{version_prefix('faq', manifest.version)}/{manifest.splits['train'][0].path}"
    data = bytearray(storage.read(key))
    (tmp_path / "shard.parquet").write_bytes(data)
    column = pq.ParquetFile(tmp_path / "shard.parquet").metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    data[column.dictionary_page_offset + column.total_compressed_size - 5] ^= 1
    (tmp_path / "shard.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(tmp_path / "shard.parquet", page_checksum_verification=True)


def test_the_same_rows_are_the_same_version(tmp_path: Path, storage: Storage) -> None:
    path = _write(tmp_path / "r.jsonl", _rows(range(100)))
    first = build_version([path], storage, "faq")
    keys = storage.list("")
    again = build_version([path], storage, "faq")
    elsewhere = build_version([path], open_storage(str(tmp_path / "elsewhere")), "faq")
    assert (first.already_published, again.already_published, elsewhere.already_published) == (False, True, False)
    assert again.manifest == first.manifest
    assert elsewhere.manifest.version == first.manifest.version
    assert storage.list("") == keys


@pytest.mark.skipif(int(pa.__version__.split(".")[0]) != 26, reason="shard bytes depend on pyarrow; frozen for 26")
def test_the_id_of_these_rows_never_changes(tmp_path: Path, storage: Storage) -> None:
    path = _write(tmp_path / "r.jsonl", _rows(range(300)))
    manifest = build_version([path], storage, "faq").manifest
    assert manifest.num_rows == {"train": 250, "eval": 24, "test": 26}
    assert manifest.version == "6f50b0201e6f167e"


@pytest.mark.parametrize(
    "change",
    [
        {"options": IngestOptions(rows_per_shard=7)},
        {"fractions": (0.7, 0.2, 0.1)},
        {"options": IngestOptions(group="topic")},
        {"options": IngestOptions(columns={"anchor": "anchor", "positive": "positive"})},
        {"options": IngestOptions(columns={"anchor": "anchor", "positive": "negative", "negative": "positive"})},
    ],
)
def test_other_content_is_another_version(tmp_path: Path, storage: Storage, change: dict[str, Any]) -> None:
    path = _write(tmp_path / "r.jsonl", _rows(range(100)))
    first = build_version([path], storage, "faq").manifest
    second = build_version([path], storage, "faq", **change).manifest
    assert second.version != first.version
    assert second.parent == first.version
    assert read_head(storage, "faq") == second.version
    assert build_version([path], storage, "faq").already_published  # and back
    assert read_head(storage, "faq") == first.version


@pytest.mark.parametrize("group", [None, "topic"])
def test_rows_stay_in_their_split_as_data_grows(tmp_path: Path, storage: Storage, group: str | None) -> None:
    numbers = list(range(600))
    random.Random(1).shuffle(numbers)
    where: dict[str, str] = {}
    for count in (100, 350, 600):
        path = _write(tmp_path / "r.jsonl", _rows(numbers[:count]))
        manifest = build_version([path], storage, "faq", IngestOptions(group=group)).manifest
        contents = _contents(storage, manifest, tmp_path)
        now = {row["anchor"]: split for split, rows in contents.items() for row in rows}
        assert len(now) == count
        assert {anchor: now[anchor] for anchor in where} == where
        where = now
    assert set(where.values()) == set(SPLITS)
    if group:
        topics = {(row["group"], split) for split, rows in contents.items() for row in rows}
        assert len(topics) == 60  # each of the 60 topics in one split only


def test_the_split_function_never_changes() -> None:
    rule = SplitRule(by="anchor", salt=SPLIT_SALT, fractions=(0.8, 0.1, 0.1))
    second_letters = "".join(rule.split_of(f"question {n}")[1] for n in range(40))  # tRain, eVal, tEst
    assert second_letters == "vrrrrrrrrrrrrerrrrrrerrrererrrrvrerrrrrr"
    for n in range(50):  # nearly equal keys share a split
        assert rule.split_of(f"{n} Straße  Café") == rule.split_of(f" {n} strasse cafe\u0301 ")
    counts = [sum(rule.split_of(str(n)) == split for n in range(20_000)) for split in SPLITS]
    assert counts == pytest.approx([16_000, 2_000, 2_000], rel=0.1)
    for fractions, only in (((1.0, 0.0, 0.0), {"train"}), ((0.5, 0.5, 0.0), {"train", "eval"})):
        rule = SplitRule(by="anchor", salt=SPLIT_SALT, fractions=fractions)
        assert {rule.split_of(str(n)) for n in range(1000)} == only


def test_bad_rows_are_quarantined_with_file_and_line(tmp_path: Path, storage: Storage) -> None:
    bad = ["{oops" + "x" * 5000, {"anchor": " ", "positive": "p", "negative": "n"}, '{"anchor": "\\ud800"}']
    path = _write(tmp_path / "r.jsonl", [*_rows(range(100)), *bad])
    result = build_version([path], storage, "faq", IngestOptions(max_bad_rows=0.03))
    assert result.bad_rows == result.manifest.bad_rows == {"not_json": 1, "blank": 1, "bad_utf8": 1}
    assert result.first_bad_rows[1] == f"{path}:102: blank: anchor is blank"
    assert sum(result.manifest.num_rows.values()) == 100
    lines = storage.read(f"{version_prefix('faq', result.manifest.version)}/quarantine.jsonl").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(entry["source"], entry["line"], entry["kind"]) for entry in entries] == [
        (str(path), 101, "not_json"),
        (str(path), 102, "blank"),
        (str(path), 103, "bad_utf8"),
    ]
    assert len(entries[0]["raw"]) == 2000
    assert entries[1]["raw"] == json.dumps(bad[1])
    assert sum(result.bad_rows.values()) == 3


TOO_MANY: list[tuple[str, object]] = [
    ("not_json", "{oops"),
    ("missing_column", {"anchor": "a", "positive": "p"}),
    ("null", {"anchor": "a", "positive": None, "negative": "n"}),
    ("blank", {"anchor": "a", "positive": "", "negative": "n"}),
    ("wrong_type", {"anchor": "a", "positive": 1, "negative": "n"}),
    ("bad_utf8", '{"anchor": "\\udcff", "positive": "p", "negative": "n"}'),
    ("over_long", {"anchor": "a", "positive": "p" * 100_001, "negative": "n"}),
    ("anchor_equals_positive", {"anchor": "a", "positive": "a", "negative": "n"}),
    ("positive_equals_negative", {"anchor": "a", "positive": "p", "negative": "p"}),
    ("anchor_equals_negative", {"anchor": "a", "positive": "p", "negative": "a"}),
]


@pytest.mark.parametrize(("kind", "row"), TOO_MANY)
def test_too_many_bad_rows_publish_nothing(tmp_path: Path, storage: Storage, kind: str, row: object) -> None:
    path = _write(tmp_path / "r.jsonl", [*_rows(range(98)), row, row])  # 2 of 100
    with pytest.raises(TooManyBadRows) as caught:
        build_version([path], storage, "faq", IngestOptions(max_bad_rows=0.019))
    assert f"{kind} 2" in caught.value.message
    assert f"{path}:99: {kind}" in caught.value.message
    assert "2 of 100 rows are bad (2.00%, the limit is 1.90%)" in caught.value.message
    assert storage.list("") == []
    at_the_limit = build_version([path], storage, "faq", IngestOptions(max_bad_rows=0.02))
    assert at_the_limit.bad_rows == {kind: 2}


def test_only_five_bad_rows_are_listed(tmp_path: Path, storage: Storage) -> None:
    path = _write(tmp_path / "r.jsonl", [*_rows(range(5)), *["{"] * 20])
    with pytest.raises(TooManyBadRows) as caught:
        build_version([path], storage, "faq")
    assert caught.value.message.count("not_json: ") == 5


@pytest.mark.parametrize(
    ("change", "data", "error", "message"),
    [
        ({}, "", DataError, "no rows"),
        (
            {"options": IngestOptions(max_bad_rows=1.0)},
            '{"anchor": "a", "positive": "a", "negative": "n"}',
            DataError,
            "all 1 rows are bad",
        ),
        ({}, '{"anchr": "a"}', DataError, "no row has a column 'anchor'"),
        (
            {"options": IngestOptions(group="topik")},
            json.dumps(_rows([1])[0]),
            DataError,
            "no row has a column 'topik'",
        ),
        ({"fractions": (0.8, 0.1, 0.2)}, "", ConfigError, "fractions are"),
        ({"fractions": (0.0, 0.5, 0.5)}, "", ConfigError, "fractions are"),
        ({"fractions": (1.1, -0.1, 0.0)}, "", ConfigError, "fractions are"),
        ({"sources": []}, "", ConfigError, "no sources"),
        ({"name": "a/b"}, "", DataError, "cannot name a dataset"),
    ],
)
def test_a_failed_build_leaves_nothing_in_storage(
    tmp_path: Path, storage: Storage, change: dict[str, Any], data: str, error: type[TercetError], message: str
) -> None:
    (tmp_path / "r.jsonl").write_text(data)
    arguments = {"sources": [tmp_path / "r.jsonl"], "storage": storage, "name": "faq", **change}
    with pytest.raises(error) as caught:
        build_version(**arguments)
    assert message in caught.value.message
    assert storage.list("") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"anchor": "anchor"}}, "'positive' is not mapped"),
        ({"columns": {"anchor": "a", "positive": "p", "score": "s"}}, "unknown column 'score'"),
        ({"slices": ("a b",)}, "'a b' cannot name slices"),
        ({"max_bad_rows": 2}, "max_bad_rows is 2"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"max_text_chars": 0}, "max_text_chars is 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        IngestOptions(**options)
    assert message in caught.value.message


def test_a_damaged_second_source_leaves_nothing_in_storage(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1....")
    with pytest.raises(DataError, match=r"damaged\.parquet"):
        build_version([_write(tmp_path / "r.jsonl", _rows(range(9000))), tmp_path / "damaged.parquet"], storage, "faq")
    assert storage.list("") == []
    assert os.listdir(tmp_path / "tmp") == []  # noqa: PTH208


@pytest.mark.parametrize("method", ["upload", "put_if_absent"])
@pytest.mark.parametrize("error", [StorageUnavailable("gone"), KeyboardInterrupt()])
def test_a_build_interrupted_before_the_manifest_is_invisible(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    before = build_version([_write(tmp_path / "r.jsonl", _rows(range(50)))], storage, "faq").manifest
    path = _write(tmp_path / "r.jsonl", _rows(range(90)))

    def cut_off(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(storage, method, cut_off)
        with pytest.raises(type(error)):
            build_version([path], storage, "faq")
    assert list_versions(storage, "faq") == [before.version]
    assert read_manifest(storage, "faq") == before
    after = build_version([path], storage, "faq")
    assert not after.already_published
    assert read_manifest(storage, "faq") == after.manifest
    assert list_datasets(storage) == ["faq"]


def test_the_manifest_is_uploaded_after_the_shards_and_before_head(
    tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def recorded(method: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            written.append(str(arguments[position]).rpartition("/")[2])
            return method(*arguments)

        return call

    for method, position in (("upload", 1), ("put_if_absent", 0), ("compare_and_swap", 0)):
        monkeypatch.setattr(storage, method, recorded(getattr(storage, method), position))
    path = _write(tmp_path / "r.jsonl", [*_rows(range(200)), "{"])
    build_version([path], storage, "faq", IngestOptions(rows_per_shard=20))
    assert written[-3:] == ["quarantine.jsonl", "manifest.json", "HEAD.json"]
    assert all(name.endswith(".parquet") for name in written[:-3])


def test_repeats_are_kept_and_reported(tmp_path: Path, storage: Storage) -> None:
    rows = _rows(range(100))
    result = build_version([_write(tmp_path / "r.jsonl", [*rows, *rows[:40]])], storage, "faq")
    assert sum(result.manifest.num_rows.values()) == 140
    assert (result.manifest.num_duplicate_rows, result.manifest.num_leaked_rows) == (40, 0)


def test_no_pair_is_in_two_splits(tmp_path: Path, storage: Storage) -> None:
    """Equal pairs are in different groups. The later split of train, eval, test keeps them."""
    rows = _rows(range(400))
    same = [{**row, "anchor": f" {row['anchor']}", "topic": f"other {row['topic']}"} for row in rows[:150]]
    path = _write(tmp_path / "r.jsonl", [*rows, *same])
    alone = build_version([_write(tmp_path / "a.jsonl", rows)], storage, "faq", IngestOptions(group="topic")).manifest
    result = build_version([path], storage, "faq", IngestOptions(group="topic"), fractions=(0.6, 0.2, 0.2))
    contents = _contents(storage, result.manifest, tmp_path)
    pairs = {
        split: {(row["anchor"].strip(), row["positive"]) for row in split_rows}
        for split, split_rows in contents.items()
    }
    assert not pairs["train"] & (pairs["eval"] | pairs["test"])
    assert not pairs["eval"] & pairs["test"]
    assert set.union(*pairs.values()) == {(row["anchor"], row["positive"]) for row in rows}  # nothing is lost
    num_leaked = result.manifest.num_leaked_rows
    assert num_leaked > 20
    assert sum(result.manifest.num_rows.values()) == 550 - num_leaked
    quarantine = storage.read(f"datasets/faq/versions/{result.manifest.version}/quarantine.jsonl").decode()
    entries = [json.loads(line) for line in quarantine.splitlines()]
    assert [entry["kind"] for entry in entries] == ["leaked"] * num_leaked
    assert all(entry["source"] == str(path) and entry["line"] > 0 for entry in entries)
    assert alone.num_leaked_rows == 0


def test_columns_are_taken_by_name(tmp_path: Path, storage: Storage) -> None:
    rows = [{"q": f"q{n}", "a": f"a{n}", "no 2": f"x{n}", "no": f"y{n}", "id": n % 3} for n in range(30)]
    columns = {"negative_10": "no 2", "negative_2": "no", "positive": "a", "anchor": "q"}
    manifest = build_version(
        [_write(tmp_path / "r.jsonl", rows)], storage, "faq", IngestOptions(columns=columns, group="id")
    ).manifest
    assert manifest.columns == ("anchor", "positive", "negative_2", "negative_10", "group")
    assert manifest.text_columns == manifest.columns[:-1]
    contents = _contents(storage, manifest, tmp_path)
    wanted = {"anchor": "q4", "positive": "a4", "negative_2": "y4", "negative_10": "x4", "group": "1"}
    assert wanted in list(chain(*contents.values()))
    assert manifest.split_rule.by == "group"


def test_sources_of_several_formats_make_one_version(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "r.csv").write_text('anchor,positive\n"q\n1",a1\nq2,a2\n')
    _write(tmp_path / "r.jsonl", _rows(range(5)))
    columns = {"anchor": "anchor", "positive": "positive"}
    manifest = build_version(
        [tmp_path / "r.csv", str(tmp_path / "r.jsonl")], storage, "faq", IngestOptions(columns=columns)
    ).manifest
    assert [source.num_rows for source in manifest.sources] == [2, 5]
    assert manifest.columns == ("anchor", "positive")


def test_progress_is_reported(tmp_path: Path, storage: Storage) -> None:
    reports: list[Progress] = []
    path = _write(tmp_path / "r.jsonl", _rows(range(25_000)))
    result: BuildResult = build_version(
        [path], storage, "faq", IngestOptions(rows_per_shard=20_000), on_progress=reports.append
    )
    assert reports[:2] == [Progress("read", 10_000, None, 0), Progress("read", 20_000, None, 0)]
    assert reports[-1] == Progress("upload", 4, 4, 0)
    shard_path = storage.uri_of(result.manifest.key_of(result.manifest.splits["train"][0]))
    assert pq.ParquetFile(shard_path).num_row_groups > 1  # memory holds a row group, not a shard


@pytest.mark.skipif(not os.environ.get("TERCET_EXTRA_TRIPLETS"), reason="TERCET_EXTRA_TRIPLETS names no file")
def test_extra_triplets_build(storage: Storage) -> None:
    path = Path(os.environ["TERCET_EXTRA_TRIPLETS"])
    with path.open(encoding="utf-8") as file:
        first, num_rows = json.loads(file.readline()), 1 + sum(1 for _ in file)
    result = build_version([path], storage, "extra", IngestOptions(group="group" if "group" in first else None))
    assert sum(result.manifest.num_rows.values()) + result.manifest.num_bad_rows == num_rows
    assert all(result.manifest.num_rows.values())
