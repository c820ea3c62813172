"""A row is described on the host, is copied to a device at once, and nothing about it is read back."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.tiny_families import tiny_encoder
from support.tiny_model import all_texts
from tercet.model.packed_model import prepare
from tercet.model.row import Row, RowCollator

ARRAYS = ("input_ids", "position_ids", "back", "seq_idx", "pooled_bounds", "attended_bounds")


def slow_row(ids: list[int], bounds: list[int], offset: int, prompts: list[int]) -> dict[str, list[int]]:
    """What `Row.of` computes, text by text and token by token."""
    texts = [range(*own) for own in pairwise(bounds)]
    order = sorted(range(len(texts)), key=lambda text: len(texts[text]))
    places = [place for text in order for place in texts[text]]
    pooled = [text[prompt if len(text) > prompt else 0 :] for text, prompt in zip(texts, prompts, strict=True)]
    return {
        "input_ids": [ids[place] for place in places],
        "position_ids": [offset + place - texts[text].start for text in order for place in texts[text]],
        "back": [places.index(place) for text in pooled for place in text],
        "seq_idx": [number for number, text in enumerate(pooled) for _ in text],
        "pooled_bounds": [sum(map(len, pooled[:number])) for number in range(len(pooled) + 1)],
        "attended_bounds": [0, *(sum(len(texts[t]) for t in order[: n + 1]) for n, t in enumerate(order) if texts[t])],
    }


def test_a_row_is_what_a_slow_description_says() -> None:
    draw = random.Random(0)
    for _ in range(200):
        lengths = draw.choices(range(draw.choice([2, 5, 30])), k=draw.randint(1, 9))
        bounds = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        ids = draw.choices(range(10_000), k=sum(lengths))
        prompts, offset = draw.choices(range(5), k=len(lengths)), draw.choice([0, 2])
        row = Row.of(np.array(bounds), offset, np.array(prompts), np.array(ids, dtype=np.int64))
        expected = slow_row(ids, bounds, offset, prompts)
        assert {name: row[name].tolist() for name in ARRAYS} == expected
        assert row.lengths == sorted(length for length in lengths if length)
        without = Row.of(np.array(bounds), offset)
        assert [ids[place] for place in without["place"].tolist()] == expected["input_ids"]
        assert len(without["seq_idx"]) == sum(lengths), "without prompts, all tokens are pooled"
        assert {row[name].dtype for name in ARRAYS[4:]} == {torch.int32}, "torch's kernels take these bounds only"


def test_a_row_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row.of(np.array([0, 3, 5]), 0, ids=np.arange(5))
    assert row.to(torch.device("cpu")) is row
    copies: list[Any] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: [copies.append((a[1:], k)), to(*a, **k)][1])
    meta = row.to(torch.device("meta"))
    assert copies == [((torch.device("meta"),), {"non_blocking": True})]
    assert {meta[name].device.type for name in ARRAYS} == {"meta"}
    assert meta.lengths == row.lengths
    memory = {row[name].untyped_storage().data_ptr() for name in ARRAYS}
    assert len(memory) == 1, "views of one block"


def test_texts_are_joined_as_sentence_transformers_does() -> None:
    features = RowCollator()([{"input_ids": [5, 6]}, {"input_ids": []}, {"input_ids": [7]}])
    assert features["input_ids"].tolist() == [[5, 6, 7]]
    assert features["cu_seq_lens_q"].tolist() == [0, 2, 2, 3]
    assert isinstance(features["cu_seq_lens_q"], np.ndarray), "on the host: losses read it"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_step_reads_nothing_back(tmp_path: Path, family: str) -> None:
    """Tensors of the device `meta` have no values: reading one raises."""
    model = SentenceTransformer(str(tiny_encoder(tmp_path, family, all_texts())), device="cpu").train()
    forward = prepare(model, "packed")
    columns = [model.preprocess(["a b c", "a"]), model.preprocess(["b", "a b"])]
    batch = forward.batch(columns).to(torch.device("meta"))
    with pytest.raises(NotImplementedError):
        batch.row["input_ids"].tolist()
    embeddings = batch.embed(model.to("meta"))
    assert [tuple(own.shape) for own in embeddings] == [(2, 24), (2, 24)]
    torch.cat(embeddings).sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "pooler" not in name)
