"""Batches from cached token ids are those of the trainer's collator, whatever the tokenizer, prompts and texts."""

from __future__ import annotations

import random
import string
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from support.tiny_families import tiny_encoder
from support.tiny_model import all_texts
from tercet.data.manifest import Shard
from tercet.model.packed_model import prepare
from tercet.planning.rows import PlannedRows
from tercet.training import token_ids
from tercet.training.token_ids import TokenIds, TokenSource, digest_of_tokenizer, open_token_ids

KINDS = ("wordpiece", "byte-bpe", "unigram", "words", "no special tokens", "Python")
ALPHABETS = (
    string.ascii_letters + " .,'-",
    "äöüßéñ ",
    "中文字符日本 ",
    "абв где ",
    "👩🇩🇪\u200d\u200b e\u0301 ",
    " \t\n",
    "ab ",
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROWS_OF_SHARDS = (23, 1, 40)


def texts(count: int, seed: int) -> list[str]:
    """Texts of many scripts; some empty or of spaces only, some longer than the model takes."""
    draw = random.Random(seed)
    own = ["".join(draw.choices(draw.choice(ALPHABETS), k=draw.choice([0, 1, 5, 30, 400]))) for _ in range(count - 2)]
    return [*own, "[CLS] [SEP] [MASK] </s>", " ".join(draw.choices(all_texts(), k=20))]


def tokenizer_of(kind: str) -> Any:
    if kind == "Python":  # without a file of the tokenizers library
        return CanineTokenizer(model_max_length=48)
    corpus = [*texts(60, 9), *all_texts()]
    if kind == "byte-bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    elif kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.normalizer, raw.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]")
    elif kind == "words":
        raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=SPECIAL)
    else:
        raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL)
    raw.train_from_iterator(corpus, trainer)
    if kind != "no special tokens":
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, raw.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=48, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model"), "bert", all_texts())


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    made = SentenceTransformer(str(folder), device="cpu")
    prepare(made, "packed")
    return made


@pytest.fixture
def opened() -> Iterator[list[TokenIds]]:
    """Whatever is added is closed."""
    made: list[TokenIds] = []
    yield made
    for each in made:
        each.close()


class Data:
    """A train split of three shards, a subset of its rows, and the collator of a trainer."""

    def __init__(self, cache_dir: Path, model: SentenceTransformer, prompts: dict[str, str] | None = None) -> None:
        num = sum(ROWS_OF_SHARDS)
        self.cache_dir, self.model = cache_dir, model
        self.rows = Dataset.from_dict({name: texts(num, seed) for seed, name in enumerate(("anchor", "positive"))})
        self.collator = SentenceTransformerDataCollator(preprocess_fn=model.preprocess, prompts=prompts or {})
        self.shards = [Shard(path=f"{n}", num_rows=n, num_bytes=1, sha256=f"{n:064x}") for n in ROWS_OF_SHARDS]

    def token_ids(self, opened: list[TokenIds], is_made: bool = True, rows: Any = None) -> TokenIds:
        part: Any = PlannedRows(dataset=None, rows=self.rows if rows is None else rows)  # type: ignore[arg-type]
        opened.append(TokenIds(TokenSource([part], [self.shards], self.cache_dir, is_made), self.collator, self.model))
        return opened[-1]

    def files(self) -> list[Path]:
        return sorted(self.cache_dir.glob("tokens/*/*.ids"))


def complete(made: TokenIds) -> None:
    """Let the thread make all files."""
    made.collate([0])
    assert made._thread is not None
    made._thread.join(60)
    assert made.is_complete


def assert_equal(inputs: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert inputs is not None
    assert list(inputs) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            assert inputs[name].dtype == value.dtype
            assert inputs[name].tolist() == value.tolist(), name
        else:
            assert inputs[name] == value


@pytest.mark.parametrize("prompts", [None, {"anchor": "query: "}, {"anchor": "query: ", "positive": "p "}])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_those_of_the_collator(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds], kind: str, prompts: dict[str, str] | None
) -> None:
    model[0].processor = tokenizer_of(kind)
    data = Data(tmp_path, model, prompts)
    made = data.token_ids(opened)
    complete(made)
    draw = random.Random(1)
    num = sum(ROWS_OF_SHARDS)
    for rows in ([*range(num)], [num - 1], *(draw.choices(range(num), k=draw.randint(1, 30)) for _ in range(20))):
        assert_equal(made.collate(rows), data.collator([data.rows[row] for row in rows]))
    assert 48 in np.diff(data.collator([*data.rows])["anchor_cu_seq_lens_q"]), "a text is truncated"


def test_selected_rows_and_several_datasets(tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds]) -> None:
    data = Data(tmp_path, model)
    chosen = data.rows.select([63, 5, 24, 23, 0, 0])
    other = Dataset.from_dict({"anchor": texts(7, 4), "positive": texts(7, 5), "negative": texts(7, 6)})
    parts: list[Any] = [PlannedRows(None, rows) for rows in (chosen, other)]  # type: ignore[arg-type]
    shards = [data.shards, [Shard(path="x", num_rows=7, num_bytes=1, sha256="e" * 64)]]
    opened.append(made := TokenIds(TokenSource(parts, shards, tmp_path, True), data.collator, model))
    complete(made)
    assert_equal(made.collate([4, 0, 1, 3]), data.collator([chosen[row] for row in (4, 0, 1, 3)]))
    assert_equal(made.collate([12, 6]), data.collator([other[6], other[0]]))


def test_files_are_found_again_and_nothing_is_tokenized(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds]
) -> None:
    data = Data(tmp_path, model)
    complete(data.token_ids(opened))
    expected = data.collator([data.rows[3]])
    again = data.token_ids(opened, is_made=False)
    assert again.is_complete, "opened before the first batch"
    again_thread = again._thread
    assert again_thread is None
    model[0].preprocess = lambda *_, **__: pytest.fail("tokenized")
    assert_equal(again.collate([3]), expected)


def test_without_files_and_where_none_are_made_nothing_is_cached(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = Data(tmp_path, model).token_ids(opened, is_made=False)
    assert made.collate([0, 5]) is None
    assert made._thread is not None
    made._thread.join(60)
    assert made.collate([0, 5]) is None
    assert not Data(tmp_path, model).files()
    assert "token ids" not in caplog.text


def _lower_limit(data: Data) -> None:
    data.model.max_seq_length = 20


def _other_prompt(data: Data) -> None:
    data.collator.prompts = {"positive": "passage: "}


def _other_special_tokens(data: Data) -> None:
    backend = data.model.tokenizer.backend_tokenizer
    special = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=special)


def _other_normalizer(data: Data) -> None:
    data.model.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


def _another_token(data: Data) -> None:
    data.model.tokenizer.add_tokens(["never seen in a probe"])


def _other_code(data: Data) -> None:
    preprocess = data.model[0].preprocess
    data.collator.preprocess_fn = lambda texts, **given: preprocess([text[::-1] for text in texts], **given)


@pytest.mark.parametrize(
    "change",
    [_lower_limit, _other_prompt, _other_special_tokens, _other_normalizer, _another_token, _other_code],
)
def test_what_changes_the_ids_has_files_of_its_own(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds], change: Callable[..., None]
) -> None:
    data = Data(tmp_path, model)
    complete(data.token_ids(opened))
    change(data)
    assert data.token_ids(opened, is_made=False).collate([1]) is None


def test_the_tokenizers_last_call_does_not_change_its_digest(model: SentenceTransformer) -> None:
    before = digest_of_tokenizer(model.tokenizer)
    model.tokenizer(["a b c", "a"], truncation=True, max_length=3, padding=True)
    assert digest_of_tokenizer(model.tokenizer) == before


def test_a_tokenizer_that_cannot_be_written_to_files_is_not_cached(
    tmp_path: Path, model: SentenceTransformer, caplog: pytest.LogCaptureFixture
) -> None:
    class Words:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, part: part.split(" ", "removed"))

    data = Data(tmp_path, model)
    source = TokenSource([PlannedRows(None, data.rows)], [data.shards], tmp_path, True)  # type: ignore[arg-type]
    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    assert open_token_ids(source, data.collator, model) is None
    assert "token ids are not cached" in caplog.text
    assert not data.files()


def test_making_files_stops_and_the_next_run_continues(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(tmp_path, model)
    blocks, until = token_ids._row_by_row, threading.Event()
    monkeypatch.setattr(token_ids, "ROWS_PER_BLOCK", 4)
    calls: list[int] = []

    def slow(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:  # in the third shard, of 40 rows
            until.set()
            opened[0]._is_stopped.wait(30)
        return blocks(*given)

    monkeypatch.setattr(token_ids, "_row_by_row", slow)
    made = data.token_ids(opened)
    assert made.collate([0]) is None
    assert until.wait(60)
    made.close()
    assert not made.is_complete
    assert len(data.files()) == 2
    assert not [*tmp_path.glob("tokens/*/*.partial")], "what is half made is removed"
    calls.clear()
    complete(data.token_ids(opened))
    assert len(calls) == 10, "only the third shard"


def test_a_full_disk_ends_the_making_and_not_the_training(
    tmp_path: Path, model: SentenceTransformer, opened: list[TokenIds], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tercet.data.token_cache.TokenCache._write", full)
    made = Data(tmp_path, model).token_ids(opened)
    assert made.collate([0]) is None
    assert made._thread is not None
    made._thread.join(60)
    assert "token ids are not cached" in caplog.text
    assert made.collate([0]) is None
