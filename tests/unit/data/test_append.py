"""Appended rows: each once, each in its split for ever, none that leaks an answer."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from tercet.data import append as append_module
from tercet.data.append import AppendResult, append
from tercet.data.build import build_version
from tercet.data.cache import load_split
from tercet.data.ingest import IngestOptions
from tercet.data.manifest import SPLIT_SALT, SPLITS, SplitRule
from tercet.data.near_duplicates import NearDuplicates, jaccard
from tercet.data.readers import find_sources
from tercet.data.versions import list_versions, publish, read_head, read_manifest
from tercet.errors import ConfigError, Conflict, DataError, DatasetNotFound, TooManyBadRows
from tercet.storage import Storage, open_storage

RULE = SplitRule(by="group", salt=SPLIT_SALT, fractions=(0.8, 0.1, 0.1))
GROUPS = {split: [f"g{n}" for n in range(400) if RULE.split_of(f"g{n}") == split] for split in SPLITS}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "cache"))


def words(seed: object, num: int = 12) -> str:
    """Return words that no other seed gives."""
    draw = random.Random(str(seed))
    return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(num))


def row(number: object, group: str) -> dict[str, str]:
    return {name: words(f"{name} {number}") for name in ("anchor", "positive", "negative")} | {"group": group}


def rows(numbers: Iterable[int]) -> list[dict[str, str]]:
    """Return rows, ten per group."""
    return [row(number, f"g{number // 10}") for number in numbers]


def write(path: Path, content: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def begin(storage: Storage, tmp_path: Path, content: Iterable[dict[str, str]]) -> str:
    source = write(tmp_path / "first.jsonl", content)
    return build_version([source], storage, "poems", IngestOptions(group="group")).manifest.version


def add(storage: Storage, tmp_path: Path, content: Iterable[dict[str, str]], name: str = "more.jsonl") -> AppendResult:
    return append([write(tmp_path / name, content)], storage, "poems", IngestOptions(group="group"))


def anchors(storage: Storage, split: str, version: str = "latest") -> list[str]:
    return list(load_split(storage, read_manifest(storage, "poems", version), split)["anchor"])


def test_a_new_version_is_its_parent_and_the_new_rows(storage: Storage, tmp_path: Path) -> None:
    first = begin(storage, tmp_path, rows(range(200)))
    before = {split: anchors(storage, split) for split in SPLITS}
    result = add(storage, tmp_path, rows(range(200, 300)))
    manifest = result.manifest
    assert result.is_new
    assert read_head(storage, "poems") == manifest.version != first
    assert manifest.parent == first
    assert sum(manifest.num_rows.values()) == 300
    assert result.num_added_rows == manifest.new_rows
    assert sum(manifest.new_rows.values()) == 100
    whole = build_version(
        [tmp_path / "first.jsonl", tmp_path / "more.jsonl"],
        open_storage(str(tmp_path / "other")),
        "poems",
        IngestOptions(group="group"),
    ).manifest
    for split in SPLITS:
        assert anchors(storage, split)[: len(before[split])] == before[split]
        assert anchors(storage, split, first) == before[split]
        assert len(anchors(storage, split)) == whole.num_rows[split]
    assert manifest.text_statistics == whole.text_statistics
    assert [source.name for source in manifest.sources] == [source.name for source in whole.sources]


def test_a_chain_of_versions_is_read_whole_on_another_machine(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(storage, tmp_path, rows(range(100)))
    for start in (100, 200, 300):
        add(storage, tmp_path, rows(range(start, start + 100)), f"{start}.jsonl")
    monkeypatch.setenv("TERCET_CACHE_DIR", str(tmp_path / "another machine"))
    assert sum(len(anchors(storage, split)) for split in SPLITS) == 400
    num_shards = sum(key.endswith(".parquet") for key in storage.list("datasets/poems"))
    assert num_shards == sum(len(shards) for shards in read_manifest(storage, "poems").splits.values())


def test_repeated_rows_are_not_added(storage: Storage, tmp_path: Path) -> None:
    begin(storage, tmp_path, rows(range(100)))
    spaced = [{**old, "anchor": f"  {old['anchor']}\t"} for old in rows(range(50, 60))]
    result = add(storage, tmp_path, [*rows(range(90, 110)), *rows(range(100, 105)), *spaced])
    assert result.num_repeated_rows == 10 + 5 + 10
    assert sum(result.num_added_rows.values()) == 10
    all_anchors = [anchor for split in SPLITS for anchor in anchors(storage, split)]
    assert len(all_anchors) == len(set(all_anchors)) == 110


def test_a_known_file_is_skipped_even_if_renamed(storage: Storage, tmp_path: Path) -> None:
    first = begin(storage, tmp_path, rows(range(100)))
    (tmp_path / "first.jsonl").rename(tmp_path / "renamed.jsonl")
    result = append([tmp_path / "renamed.jsonl"], storage, "poems", IngestOptions(group="group"))
    assert (result.is_new, result.num_known_sources, result.num_repeated_rows) == (False, 1, 0)
    assert result.text() == "nothing new; 1 file was read before"
    assert read_head(storage, "poems") == first


def test_without_a_new_row_there_is_no_new_version(storage: Storage, tmp_path: Path) -> None:
    first = begin(storage, tmp_path, rows(range(100)))
    result = add(storage, tmp_path, rows(range(30)))
    assert (result.is_new, result.num_repeated_rows) == (False, 30)
    assert list_versions(storage, "poems") == [first]


def near(original: dict[str, str], group: str) -> dict[str, str]:
    """Return a near-duplicate in another group: one letter of each text differs, and one is a capital."""
    texts = {name: original[name][:20].capitalize() + "#" + original[name][21:] for name in ("anchor", "positive")}
    return {**original, **texts, "group": group}


@pytest.mark.parametrize(("held_out", "num_left"), [("eval", 1), ("test", 1), ("train", 0)])
def test_a_near_duplicate_of_a_held_out_row_is_kept_out_of_training(
    storage: Storage, tmp_path: Path, held_out: str, num_left: int
) -> None:
    original = row("a", GROUPS[held_out][0])
    begin(storage, tmp_path, [*rows(range(100)), original])
    result = add(storage, tmp_path, [row("b", GROUPS["train"][1]), near(original, GROUPS["train"][2])])
    assert result.num_near_duplicates == num_left
    assert result.num_added_rows == {"train": 2 - num_left, "eval": 0, "test": 0}
    if num_left:
        prefix = f"datasets/poems/versions/{result.manifest.version}"
        line = json.loads(storage.read(f"{prefix}/quarantine.jsonl"))
        assert (line["kind"], line["line"]) == ("near_copy", 2)
        assert line["detail"] == f"near-duplicate of a row in the {held_out} split"
        assert result.manifest.bad_rows == {}


def test_a_held_out_row_near_an_old_train_row_is_excluded(storage: Storage, tmp_path: Path) -> None:
    """A row that a model was trained on cannot become a test row."""
    original = row("a", GROUPS["train"][0])
    begin(storage, tmp_path, [*rows(range(100)), original])
    copy, copy_of_copy = near(original, GROUPS["test"][0]), near(original, GROUPS["train"][3])
    copy_of_copy["anchor"] += "!"
    result = add(storage, tmp_path, [copy, copy_of_copy])
    assert result.num_near_duplicates == 1
    assert result.num_added_rows == {"train": 1, "eval": 0, "test": 0}  # an excluded row excludes no other


def test_of_two_new_near_duplicates_the_train_row_is_excluded(storage: Storage, tmp_path: Path) -> None:
    begin(storage, tmp_path, rows(range(100)))
    original = row("a", GROUPS["train"][0])
    result = add(storage, tmp_path, [original, near(original, GROUPS["test"][0])])
    assert result.num_near_duplicates == 1
    assert result.num_added_rows == {"train": 0, "eval": 0, "test": 1}


def test_an_equal_anchor_with_another_positive_is_no_near_duplicate(storage: Storage, tmp_path: Path) -> None:
    original = row("a", GROUPS["test"][0])
    begin(storage, tmp_path, [*rows(range(100)), original])
    result = add(storage, tmp_path, [{**row("b", GROUPS["train"][0]), "anchor": original["anchor"]}])
    assert result.num_near_duplicates == 0


def test_near_duplicates_are_found_by_both_texts() -> None:
    """Exactly the pairs that a full comparison of all pairs finds."""
    draw, index = random.Random(1), NearDuplicates()
    texts = [words(number, 8) for number in range(60)]
    for text in list(texts):
        letters = list(text)
        for _ in range(draw.randrange(1, 9)):
            letters[draw.randrange(len(letters))] = draw.choice("xyz ")
        texts.append("".join(letters))
    index.add(texts, texts)
    assert len(index) == 120
    near_ones = {(a, b) for a in range(120) for b in range(120) if jaccard(texts[a], texts[b]) >= 0.8}
    assert 120 + 20 < len(near_ones) < 120 + 110
    assert {(a, b) for a, others in enumerate(index.find(texts, texts)) for b in others} == near_ones
    assert index.find(texts[:1], [words("other")]) == [[]]


def test_concurrent_appends_lose_no_row(storage: Storage, tmp_path: Path) -> None:
    begin(storage, tmp_path, rows(range(100)))
    results: list[AppendResult] = []
    starts = range(100, 400, 50)
    threads = [
        threading.Thread(
            target=lambda start=start: results.append(
                add(storage, tmp_path, rows(range(start, start + 50)), f"{start}.jsonl")
            )
        )
        for start in starts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(result.num_added_rows.values()) for result in results] == [50] * len(starts)
    assert sum(read_manifest(storage, "poems").num_rows.values()) == 400
    version, chain = read_head(storage, "poems"), 0
    while version is not None:
        version, chain = read_manifest(storage, "poems", version).parent, chain + 1
    assert chain == 1 + len(starts)


def test_a_version_published_meanwhile_is_extended(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds some of the same rows, which are not added twice."""
    begin(storage, tmp_path, rows(range(100)))
    came = False

    def late(*arguments: object, **named: object) -> object:
        nonlocal came
        if not came:
            came = True
            add(storage, tmp_path, rows(range(100, 150)), "same-rows.jsonl")
        return publish(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(append_module, "publish", late)
    result = add(storage, tmp_path, [*rows(range(100, 150)), row("x", GROUPS["train"][0])])
    assert result.num_repeated_rows == 50
    assert sum(result.num_added_rows.values()) == 1
    assert sum(read_manifest(storage, "poems").num_rows.values()) == 151


def test_it_gives_up_if_others_keep_publishing(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(storage, tmp_path, rows(range(100)))
    monkeypatch.setattr(append_module, "ATTEMPTS", 2)

    def always(*_: object, **__: object) -> None:
        raise Conflict("another one")

    monkeypatch.setattr(append_module, "publish", always)
    with pytest.raises(Conflict, match="poems got 2 other versions"):
        add(storage, tmp_path, rows(range(100, 150)))


def test_bad_rows_are_quarantined_and_too_many_publish_nothing(storage: Storage, tmp_path: Path) -> None:
    first = begin(storage, tmp_path, rows(range(100)))
    bad = {**row("bad", "g1"), "positive": " "}
    result = add(storage, tmp_path, [*rows(range(100, 300)), bad])
    assert result.bad_rows == {"blank": 1}
    assert result.first_bad_rows == (f"{tmp_path / 'more.jsonl'}:201: blank: positive is blank",)
    with pytest.raises(TooManyBadRows):
        add(storage, tmp_path, [bad, *rows(range(300, 310))])
    assert read_manifest(storage, "poems").parent == first


def test_the_dataset_must_exist_with_the_same_columns(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound):
        add(storage, tmp_path, rows(range(10)))
    begin(storage, tmp_path, rows(range(100)))
    with pytest.raises(ConfigError, match="would have the columns anchor, positive, negative; poems"):
        append([tmp_path / "first.jsonl"], storage, "poems")
    with pytest.raises(DataError, match="no such file"):
        append([tmp_path / "none.jsonl"], storage, "poems", IngestOptions(group="group"))


def test_slices_are_labels_not_texts(storage: Storage, tmp_path: Path) -> None:
    content = [{**plain, "language": "en" if number % 2 else 7} for number, plain in enumerate(rows(range(100)))]
    source = write(tmp_path / "sliced.jsonl", content)  # type: ignore[arg-type]
    manifest = build_version([source], storage, "poems", IngestOptions(group="group", slices=("language",))).manifest
    assert manifest.columns == ("anchor", "positive", "negative", "group", "slice_language")
    assert manifest.text_columns == ("anchor", "positive", "negative")
    assert set(manifest.text_statistics) == set(manifest.text_columns)
    assert set(load_split(storage, manifest, "train")["slice_language"]) == {"en", "7"}


def test_files_are_found_by_pattern(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "under/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert find_sources([f"{tmp_path}/*.jsonl", a]) == [a, b]
    assert find_sources([f"{tmp_path}/none-*"]) == []
    assert find_sources([f"{tmp_path}/none.jsonl"]) == [f"{tmp_path}/none.jsonl"]
    with pytest.raises(ConfigError, match=r"missing/\*\.jsonl: .*/missing: No such file"):
        find_sources([f"{tmp_path}/missing/*.jsonl"])
    with pytest.raises(ConfigError, match="only the last part"):
        find_sources([f"{tmp_path}/un*/d.jsonl"])
