"""The evaluators in one process: what they encode, and whether their metrics are those of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, TripletEvaluator

from support import tiny_model
from tercet.errors import NonFiniteError
from tercet.evaluation.encodings import Encodings, num_sharing_ranks
from tercet.evaluation.evaluate import evaluate, make_evaluator, recipe_metrics

BATCH_SIZE = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return SentenceTransformer(
        str(tiny_model.tiny_bert(tmp_path_factory.mktemp("model") / "bert", tiny_model.all_texts())), device="cpu"
    )


def splits(**negatives: list[str]) -> dict[str, Dataset]:
    """Return 30 train and 30 eval rows, with the negatives of tiny_model unless others are given."""
    rows = tiny_model.triplets(60)
    columns = {name: [row[name] for row in rows] for name in ("anchor", "positive")}
    columns |= negatives or {"negative": [row["negative"] for row in rows]}
    whole = Dataset.from_dict(columns)
    return {"train": whole.select(range(30)), "eval": whole.select(range(30, 60))}


class Encoded:
    """Counts the texts that a model encodes."""

    def __init__(self, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[tuple[str, str]] = []
        for role in ("query", "document"):
            monkeypatch.setattr(model, f"encode_{role}", self._counting(role, getattr(model, f"encode_{role}")))

    def _counting(self, role: str, encode: Any) -> Any:
        def counting(texts: list[str], **kwargs: Any) -> Any:
            self.texts += [(role, text) for text in texts]
            return encode(texts, **kwargs)

        return counting


def test_the_metrics_are_those_of_sentence_transformers(model: SentenceTransformer) -> None:
    rows = splits()
    anchors, positives, negatives = (list(rows["eval"][name]) for name in ("anchor", "positive", "negative"))
    corpus = {text: text for text in [*positives, *rows["train"]["positive"]]}
    relevant = {anchor: {positive} for anchor, positive in zip(anchors, positives, strict=True)}
    retrieval = InformationRetrievalEvaluator({text: text for text in anchors}, corpus, relevant, write_csv=False)(
        model
    )
    triplet = TripletEvaluator(anchors, positives, negatives, write_csv=False)(model)
    metrics = evaluate(model, rows, "eval", BATCH_SIZE)
    assert metrics == pytest.approx(recipe_metrics({**retrieval, **triplet}), abs=1e-6)
    assert 0 < metrics["ndcg@10"] < 1
    assert 0 < metrics["triplet_accuracy"] < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The evaluators of sentence-transformers treat them as far away."""
    rows = splits()
    text, encode = rows["eval"]["positive"][3], model.encode_document

    def planted(texts: list[str], **kwargs: Any) -> Any:
        embeddings = encode(texts, **kwargs).clone()
        if text in texts:
            embeddings[texts.index(text), 5] = value
        return embeddings

    monkeypatch.setattr(model, "encode_document", planted)
    evaluator = make_evaluator(rows, "eval", BATCH_SIZE)
    with pytest.raises(NonFiniteError, match=f"at step 7: the embeddings of 1 of .* such as that of '{text}'"):
        evaluator(model, epoch=1.0, steps=7)
    with pytest.raises(NonFiniteError, match=r"^evaluation: the embeddings"):
        evaluate(model, rows, "eval", BATCH_SIZE)
    monkeypatch.undo()
    evaluator(model, epoch=1.0, steps=8)


def test_no_text_is_encoded_twice(model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = splits()
    encoded = Encoded(model, monkeypatch)
    evaluator = make_evaluator(rows, "eval", BATCH_SIZE)
    first = evaluator(model)
    documents = {*rows["train"]["positive"], *rows["eval"]["positive"], *rows["eval"]["negative"]}
    assert sorted(encoded.texts) == sorted(
        [*(("query", text) for text in set(rows["eval"]["anchor"])), *(("document", text) for text in documents)]
    )
    encoded.texts.clear()
    assert evaluator(model) == first
    assert encoded.texts, "the model may have changed since"


def test_every_negative_of_a_row_counts(model: SentenceTransformer) -> None:
    rows = tiny_model.triplets(60)
    random = [row["negative"] for row in rows]
    # No text is nearer to an anchor than the anchor itself.
    itself = [row["anchor"] for row in rows]
    alone = evaluate(model, splits(negative=random), "eval", BATCH_SIZE)["triplet_accuracy"]
    lost = evaluate(model, splits(negative=itself), "eval", BATCH_SIZE)["triplet_accuracy"]
    assert lost == 0.0 < alone
    both = evaluate(model, splits(negative_1=random, negative_2=itself), "eval", BATCH_SIZE)
    assert both["triplet_accuracy"] == pytest.approx(alone / 2, abs=1e-6)
    many = {f"negative_{n}": itself if n > 8 else random for n in range(1, 11)}
    ten = evaluate(model, splits(**many), "eval", BATCH_SIZE)
    assert ten["triplet_accuracy"] == pytest.approx(alone * 8 / 10, abs=1e-6)
    assert ten["ndcg@10"] == both["ndcg@10"], "negatives are not in the corpus"


def test_pairs_have_no_triplet_accuracy(model: SentenceTransformer) -> None:
    pairs = {name: rows.remove_columns("negative") for name, rows in splits().items()}
    assert set(evaluate(model, pairs, "eval", BATCH_SIZE)) == {"ndcg@10", "mrr@10"}


def test_embeddings_are_fp32_in_the_order_of_the_texts(tmp_path: Path, model: SentenceTransformer) -> None:
    texts = ["bo da", "bo", "bo da", "da da da da"]
    half = SentenceTransformer(
        str(tiny_model.tiny_bert(tmp_path / "half", tiny_model.all_texts())),
        device="cpu",
        model_kwargs={"dtype": torch.bfloat16},
    )
    for one in (model, half):
        embeddings = Encodings().of(one, texts, "document", 2)
        assert embeddings.dtype == torch.float32
        wanted = one.encode(texts, convert_to_tensor=True).float()
        torch.testing.assert_close(embeddings, wanted, rtol=0, atol=1e-6 if one is model else 0.05)
        assert torch.equal(embeddings[0], embeddings[2])


def test_one_rank_does_not_wait_for_others_inside_distributed_evaluation(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside `distributed_evaluation` of sentence-transformers, only one rank runs the evaluator."""
    assert num_sharing_ranks(model) == 1
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert num_sharing_ranks(model) == 3
    monkeypatch.setattr(model, "_distributed_inference", object())
    assert num_sharing_ranks(model) == 1
