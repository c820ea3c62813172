"""The loss on a split is that of sentence-transformers batch by batch, and no text is encoded for it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer

from support import tiny_model
from tercet.config.losses import LossConfig
from tercet.evaluation.evaluate import make_evaluator
from tercet.evaluation.evaluators import split_loss
from tercet.model.loss import make_loss
from tercet.model.packed_model import prepare

NUM_ROWS, ROWS_AT_ONCE, BATCH_SIZE = 21, 8, 5
NAMES = [
    "TripletLoss",
    "MultipleNegativesRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MegaBatchMarginLoss",
    "AnglELoss",
]
MATRYOSHKA = {"dims": [16, 32, 8], "weights": [0.5, 1.0, 0.25], "dims_per_step": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.tiny_bert(tmp_path_factory.mktemp("split") / "model", tiny_model.all_texts())


def config(name: str, **parameters: Any) -> Any:
    return TypeAdapter(LossConfig).validate_python({"name": name, **parameters})


def splits(name: str) -> dict[str, Dataset]:
    rows = tiny_model.triplets(2 * NUM_ROWS)
    columns = ("anchor", "positive") if name == "MegaBatchMarginLoss" else ("anchor", "positive", "negative")
    whole = Dataset.from_dict({column: [row[column] for row in rows] for column in columns})
    return {"train": whole.select(range(NUM_ROWS)), "eval": whole.select(range(NUM_ROWS, 2 * NUM_ROWS))}


def librarys_own(section: Any, model: SentenceTransformer, rows: Dataset) -> float:
    """Return the mean loss over rows, with each batch tokenized and embedded by the loss itself."""
    if section.matryoshka is not None:
        section = section.model_copy(
            update={"matryoshka": section.matryoshka.model_copy(update={"dims_per_step": None})}
        )
    loss, total = make_loss(section, model), 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        with torch.no_grad():
            value = loss([model.preprocess(texts) for texts in batch.values()], None)
        total += float(value) * len(batch["anchor"])
    return total / len(rows)


@pytest.mark.parametrize("matryoshka", [None, MATRYOSHKA], ids=["plain", "matryoshka"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_sentence_transformers_own(folder: Path, name: str, matryoshka: Any) -> None:
    model = SentenceTransformer(str(folder), device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    section, rows = config(name, matryoshka=matryoshka), splits(name)
    expected = librarys_own(section, model, rows["eval"])
    prepare(model, "packed", section.is_cached)
    loss = split_loss(section, model, rows["eval"], ROWS_AT_ONCE, BATCH_SIZE)
    evaluator = make_evaluator(rows, "eval", BATCH_SIZE, loss)
    counts = []
    for each in (evaluator, make_evaluator(rows, "eval", BATCH_SIZE)):
        metrics = each(model)
        counts.append(each.encodings.num_encoded)
        assert ("loss" in metrics) == (each is evaluator)
        if each is evaluator:
            assert metrics["loss"] == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert counts[0] == counts[1] > 0


def test_smaller_batches_change_the_loss(folder: Path) -> None:
    """Otherwise the comparison above would prove nothing."""
    model = SentenceTransformer(str(folder), device="cpu").eval()
    section, rows = config("MultipleNegativesRankingLoss"), splits("MultipleNegativesRankingLoss")
    values = []
    for rows_at_once in (ROWS_AT_ONCE, ROWS_AT_ONCE // 2):
        loss = split_loss(section, model, rows["eval"], rows_at_once, BATCH_SIZE)
        values.append(make_evaluator(rows, "eval", BATCH_SIZE, loss)(model)["loss"])
    assert abs(values[0] - values[1]) > 0.1


def test_a_loss_with_a_guide_has_no_split_loss(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    section = config("GISTEmbedLoss", guide="another/model")
    assert split_loss(section, model, splits("GISTEmbedLoss")["eval"], ROWS_AT_ONCE, BATCH_SIZE) is None
