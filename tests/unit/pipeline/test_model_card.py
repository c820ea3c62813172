"""The model card can be read by huggingface_hub."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from support import builders
from tercet.pipeline.model_card import model_card

RECIPE = "name: made\n"


@pytest.fixture(scope="module")
def text() -> str:
    return model_card(builders.plan(), builders.metrics(), builders.LOG_HISTORY, RECIPE)


def test_front_matter(text: str) -> None:
    data = ModelCard(text).data
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert data.base_model == "someone/model"
    assert data.model_name == "made"
    assert "loss:MultipleNegativesRankingLoss" in data.tags


def test_the_model_index_holds_the_metrics(text: str) -> None:
    assert "\nmodel-index:\n" in text.split("---")[1]
    results = {(r.dataset_split, r.metric_name): r for r in ModelCard(text).data.eval_results or []}
    assert {key: result.metric_value for key, result in results.items()} == {
        ("eval", "ndcg@10"): 0.7,
        ("test", "ndcg@10"): 0.75,
    }
    assert results["test", "ndcg@10"].metric_type == "ndcg_at_10"
    assert results["test", "ndcg@10"].dataset_revision == builders.manifest().version


@pytest.mark.parametrize("name", ["package:some_model", "/a/folder/of/mine"])
def test_a_model_that_is_not_on_the_hub_is_not_linked(name: str) -> None:
    text = model_card(builders.plan(model={"name_or_path": name}), builders.metrics(), [], RECIPE)
    assert ModelCard(text).data.base_model is None
    assert f"`{name}`" in text


def test_the_body(text: str) -> None:
    body = ModelCard(text).text
    assert "| ndcg@10 | test | 0.5000 | 0.7500 |" in body
    assert "| step | epoch | training loss | loss | ndcg@10 |\n|--:|--:|--:|--:|--:|\n" in body
    assert "| 0 | 0.0000 | - | 2.0000 | 0.4000 |\n| 1 | 0.1000 | 2.5000 | - | - |\n| 10 | 1.0000 | 1.2500 | 1.5" in body
    assert "```yaml\nname: made\n```" in body
    assert "trust_remote_code" not in body


def test_datasets_are_listed(text: str) -> None:
    version = builders.manifest().version
    assert f"on 105 rows of `poems` (version `{version}`).\nRun `" in text
    mix = [{"name": "docs", "weight": 0.5}, {"name": "faq", "weight": 2}]
    mixed = model_card(builders.plan(mix=mix), builders.metrics(), [], RECIPE)
    docs, faq = (builders.mixed_manifest(name).version for name in ("docs", "faq"))
    assert (
        f"on 105 rows of `poems` (version `{version}`, weight 1),\n50 rows of `docs` (version `{docs}`, weight 0.5),\n"
        f"50 rows of `faq` (version `{faq}`, weight 2).\nThe eval and test splits are those of `poems`.\nRun `"
    ) in mixed
    twice = model_card(builders.plan(dataset={"name": "poems", "weight": 2}), builders.metrics(), [], RECIPE)
    assert f"(version `{version}`, weight 2).\nRun `" in twice


def test_the_example_trusts_remote_code_if_the_model_needs_it() -> None:
    text = model_card(builders.plan(model={"trust_remote_code": True}), builders.metrics(), [], RECIPE)
    assert 'SentenceTransformer("path/to/this/folder", trust_remote_code=True)' in text
