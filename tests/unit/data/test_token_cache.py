"""Files of token ids: made once, verified when opened, mapped, sliced."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from tercet.data.manifest import Shard
from tercet.data.token_cache import TokenCache, Tokens

NUM_COLUMNS = 3
SHARDS = [Shard(path=f"{n}", num_rows=n, num_bytes=1, sha256=f"{n:064x}") for n in (50, 1, 7)]
NUM_ROWS = sum(shard.num_rows for shard in SHARDS)


class Texts:
    """Token ids of some texts, and a count of the rows that were tokenized."""

    def __init__(self, max_id: int = 70_000) -> None:
        draw = random.Random(0)
        self.max_id, self.num_tokenized = max_id, 0
        self.ids = [
            [[draw.randrange(max_id + 1) for _ in range(draw.choice([0, 1, 2, 40]))] for _ in range(NUM_COLUMNS)]
            for _ in range(NUM_ROWS)
        ]

    def tokenize(self, first: int, stop: int) -> Iterator[Tokens]:
        for start in range(first, stop, 4):
            texts = [text for row in self.ids[start : min(start + 4, stop)] for text in row]
            self.num_tokenized += len(texts) // NUM_COLUMNS
            yield Tokens(np.array([i for text in texts for i in text], np.int64), np.array([*map(len, texts)]))

    def cache(self, folder: Path, key: str = "k") -> TokenCache:
        return TokenCache(folder, key, SHARDS, NUM_COLUMNS, self.max_id)

    def made(self, folder: Path) -> TokenCache:
        cache = self.cache(folder)
        assert all(cache.open(number) or cache.make(number, self.tokenize) for number in range(len(SHARDS)))
        return cache


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens/k/*.ids"))


@pytest.mark.parametrize("max_id", [0, 65_535, 65_536])
def test_any_rows_are_taken_in_their_order(tmp_path: Path, max_id: int) -> None:
    texts, draw = Texts(max_id), random.Random(1)
    cache = texts.made(tmp_path)
    assert cache.is_complete
    for rows in ([0], [NUM_ROWS - 1, 0], [50, 50], *(draw.choices(range(NUM_ROWS), k=20) for _ in range(20))):
        taken = cache.take(np.array(rows))
        assert taken is not None
        for column, tokens in enumerate(taken):
            own = [texts.ids[row][column] for row in rows]
            assert tokens.ids.tolist() == [i for text in own for i in text]
            assert tokens.ids.dtype == np.int64
            assert tokens.lengths.tolist() == [*map(len, own)]
    num_bytes = 2 if max_id < 2**16 else 4
    num_ids = sum(len(text) for row in texts.ids[:50] for text in row)
    assert files(tmp_path)[-1].stat().st_size == -(-num_ids * num_bytes // 8) * 8 + 8 * (50 * NUM_COLUMNS + 1)


def test_an_id_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    texts = Texts(100)
    texts.ids[3][1] = [2**16]
    with pytest.raises(Exception, match="65536 is not in the tokenizer's vocabulary"):
        texts.made(tmp_path)
    assert not files(tmp_path)


def test_rows_of_a_missing_file_are_not_taken(tmp_path: Path) -> None:
    texts = Texts()
    cache = texts.cache(tmp_path)
    assert cache.make(0, texts.tokenize)
    assert not cache.open(1)
    assert cache.take(np.array([0, 49])) is not None
    assert cache.take(np.array([0, 50])) is None
    assert not cache.is_complete


def test_files_are_made_once_by_many(tmp_path: Path) -> None:
    texts = Texts()
    texts.made(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        caches = [*pool.map(texts.made, [tmp_path] * 4)]
    assert all(cache.is_complete for cache in caches)
    assert texts.num_tokenized == NUM_ROWS
    other = texts.cache(tmp_path, "another tokenizer")
    assert not other.open(0)


def test_a_file_that_another_process_makes_is_not_waited_for(tmp_path: Path) -> None:
    texts = Texts()
    cache = texts.cache(tmp_path)
    assert not (tmp_path / "tokens").exists(), "a run that makes no files leaves nothing behind"
    (tmp_path / "tokens" / "k").mkdir(parents=True)
    with FileLock(tmp_path / "tokens" / "k" / f"{SHARDS[0].sha256}.lock"):
        assert not cache.make(0, texts.tokenize)
    assert cache.make(0, texts.tokenize)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "longer"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    texts = Texts()
    texts.made(tmp_path)
    path = files(tmp_path)[-1]
    whole = path.read_bytes()
    bit = bytearray(whole)
    bit[len(whole) // 2] ^= 1
    path.write_bytes({"bit": bytes(bit), "cut": whole[:-9], "empty": b"", "longer": whole + b"\0" * 8}[damage])
    texts.num_tokenized = 0
    cache = texts.cache(tmp_path)
    assert [cache.open(number) for number in range(3)] == [False, True, True]
    texts.made(tmp_path)
    assert texts.num_tokenized == 50
    assert files(tmp_path)[-1].read_bytes() == whole


def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path) -> None:
    texts = Texts()
    texts.cache(tmp_path)
    partial = tmp_path / "tokens" / "k" / f"{SHARDS[0].sha256}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"half")
    texts.made(tmp_path)
    assert not partial.exists()
    assert len(files(tmp_path)) == 3


def test_files_are_mapped_not_read(tmp_path: Path) -> None:
    cache = Texts().made(tmp_path)
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in files(tmp_path))
    assert cache.take(np.array([0])) is not None
