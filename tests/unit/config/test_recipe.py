"""Every error of a recipe is reported at once, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from support.builders import config
from tercet.config import recipe_yaml
from tercet.config.examples import RECIPES_DIR
from tercet.config.recipe import Config, load_config
from tercet.config.sections import SliceConfig
from tercet.errors import ConfigError

BAD = """\
nmae: x
dataset:
  name: d
  vresion: latest
model:
  name_or_path: m
  sha256: abc
loss:
  name: TripletLoss
  triplet_margn: 5
training:
  learning_rate: 2e-5
  num_epochs: 0
  weight_decay: .nan
workers:
  zzz: 1
"""

GOLDEN = """\
r.yaml:1:1: `name` is missing
--set evaluation.metric=ndcg: `evaluation.metric`: input should be 'ndcg@10', 'mrr@10' or 'triplet_accuracy', not 'ndcg'
r.yaml:1:1: unknown key `nmae`; did you mean `name`?
r.yaml:4:3: unknown key `dataset.vresion`; did you mean `version`?
r.yaml:7:3: `model.sha256`: string should match pattern '^[0-9a-f]{64}$', not 'abc'
r.yaml:10:3: unknown key `loss.triplet_margn`; did you mean `triplet_margin`?
--set training.seeed=1: unknown key `training.seeed`; did you mean `seed`?
r.yaml:13:3: `training.num_epochs`: input should be greater than 0, not 0
r.yaml:14:3: `training.weight_decay`: input should be a finite number, not nan
r.yaml:16:3: unknown key `workers.zzz`; known here: num_workers, min, max, grow_check_seconds, parallelism, deepspeed, \
memory_gib_per_worker, packing, try_longest_batch, use_gpu, cpus_per_worker, max_failures, max_preemptions, \
step_timeout_seconds, start_timeout_seconds, cache_dir, token_cache"""

UNIONS = {
    "workers.use_gpu=maybe": "a valid boolean, or 'auto', not 'maybe'",
    "training.gradient_accumulation_steps=0": "greater than 0, or 'auto', not 0",
    "training.gradient_accumulation_steps=x": "a valid integer, or 'auto', not 'x'",
    "workers.parallelism=x": "'auto', or 'ddp', 'zero1', 'zero2', 'zero3', 'zero3_offload' or 'fsdp2', not 'x'",
    "model.lora.target_modules=query": "a list in brackets, [...], or 'all-linear', not 'query'",
}

GOOD: dict[str, Any] = {
    "name": "x",
    "dataset": {"name": "d"},
    "model": {"name_or_path": "m"},
    "loss": {"name": "TripletLoss"},
}


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.hint
    return caught.value.message.replace(str(path), "r.yaml")


def accepted(tmp_path: Path, document: dict[str, Any], *overrides: str) -> Config:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_config(path, overrides)


def test_all_errors_are_reported_at_once_with_their_positions(tmp_path: Path) -> None:
    message = refused(tmp_path, BAD, "evaluation.metric=ndcg", "training.seeed=1")
    assert sorted(message.splitlines()) == sorted(GOLDEN.splitlines())
    in_file = [line for line in message.splitlines() if line.startswith("r.yaml")]
    assert in_file == sorted(in_file, key=lambda line: int(line.split(":")[1]))


@pytest.mark.parametrize(("override", "wanted"), UNIONS.items())
def test_a_value_that_no_member_of_a_union_takes_is_one_error(override: str, wanted: str, tmp_path: Path) -> None:
    message = refused(tmp_path, yaml.safe_dump(GOOD), override)
    assert message == f"--set {override}: `{override.split('=')[0]}`: input should be {wanted}"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            "{name: TripletLos}",
            "r.yaml:4:8: unknown loss `TripletLos`; did you mean `TripletLoss`? (known: TripletLoss, ",
        ),
        ("{name: qqq}", "r.yaml:4:8: unknown loss `qqq` (known: TripletLoss, "),
        ("{triplet_margin: 1}", "r.yaml:4:1: `loss.name` is missing (known: TripletLoss, "),
        (
            "{name: TripletLoss, q: 1}",
            "r.yaml:4:27: unknown key `loss.q`; known here: name, matryoshka, distance_metric, triplet_margin",
        ),
        ("{name: TripletLoss, scale: 1}", "r.yaml:4:27: unknown key `loss.scale`"),  # a parameter of another loss
        (
            "{name: CachedMultipleNegativesRankingLos}",
            "r.yaml:4:8: unknown loss `CachedMultipleNegativesRankingLos`; "
            "did you mean `CachedMultipleNegativesRankingLoss`?",
        ),
        ("{name: MSELoss}", "r.yaml:4:8: `MSELoss` cannot be used: it needs a teacher's scores or embeddings as label"),
        ("TripletLoss", "r.yaml:4:1: `loss` must be a section of keys and values, not of type str"),
        (
            "{name: CachedMultipleNegativesRankingLoss, mini_batch: 8}",
            "r.yaml:4:50: unknown key `loss.mini_batch`; did you mean `mini_batch_size`?",
        ),
        ("{name: GISTEmbedLoss}", "r.yaml:4:1: `loss.guide` is missing"),
        (
            "{name: MultipleNegativesRankingLoss, scale: 0}",
            "r.yaml:4:44: `loss.scale`: input should be greater than 0, not 0",
        ),
        (
            "{name: MultipleNegativesRankingLoss, similarity_fct: cosine}",
            "r.yaml:4:44: `loss.similarity_fct`: input should be 'cos_sim', 'dot_score', 'euclidean_sim' or ",
        ),
        (
            "{name: MultipleNegativesRankingLoss, directions: query_to_doc}",
            "r.yaml:4:44: `loss.directions` must be a list in brackets, [...], not 'query_to_doc'",
        ),
        (
            "{name: MultipleNegativesRankingLoss, directions: [doc_to_query]}",
            "r.yaml:4:44: `loss.directions`: must include query_to_doc: no other direction has the positive",
        ),
        (
            "{name: TripletLoss, matryoshka: {dims: [8], dims_per_stp: 1}}",
            "r.yaml:4:51: unknown key `loss.matryoshka.dims_per_stp`; did you mean `dims_per_step`?",
        ),
        (
            "{name: TripletLoss, matryoshka: {dims: [8], q: 1}}",
            "r.yaml:4:51: unknown key `loss.matryoshka.q`; known here: dims, weights, dims_per_step",
        ),
        (
            "{name: TripletLoss, matryoshka: {dims: [8, 0]}}",
            "r.yaml:4:50: `loss.matryoshka.dims.1`: input should be greater than 0, not 0",
        ),
        (
            "{name: TripletLoss, matryoshka: {dims: [8, 4], weights: [1]}}",
            "r.yaml:4:54: `loss.matryoshka.weights`: needs one weight for each of the 2 dims, not 1",
        ),
        ("{name: TripletLoss, matryoshka: {}}", "r.yaml:4:27: `loss.matryoshka.dims` is missing"),
        ("{name: TripletLoss, matryoshka: 8}", "r.yaml:4:27: `loss.matryoshka` must be a section of keys and values"),
    ],
)
def test_errors_of_a_loss(tmp_path: Path, loss: str, message: str) -> None:
    text = f"name: x\ndataset: {{name: d}}\nmodel: {{name_or_path: m}}\nloss: {loss}\n"
    assert refused(tmp_path, text).startswith(message)


def test_every_error_of_a_loss_has_its_own_line(tmp_path: Path) -> None:
    text = """\
name: x
dataset: {name: d}
model: {name_or_path: m}
loss:
  name: CachedMultipleNegativesRankingLoss
  mini_batch_size: 0
  matryoshka:
    dims: [8, 8]
    weihgts: [1, 1]
"""
    message = refused(tmp_path, text, "loss.hardness_mode=all_negatives", "loss.matryoshka.dims_per_step=0")
    assert sorted(message.splitlines()) == [
        "--set loss.matryoshka.dims_per_step=0: `loss.matryoshka.dims_per_step`: input should be greater than 0, not 0",
        "r.yaml:4:1: `loss.hardness_strength`: must be above 0 with all_negatives",
        "r.yaml:6:3: `loss.mini_batch_size`: input should be greater than 0, not 0",
        "r.yaml:8:5: `loss.matryoshka.dims`: 8 is given twice",
        "r.yaml:9:5: unknown key `loss.matryoshka.weihgts`; did you mean `weights`?",
    ]


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, key: str, number: str) -> None:
    assert f"`training.{key}`" in refused(tmp_path, yaml.safe_dump(GOOD), f"training.{key}={number}")


def test_a_recipe_of_a_few_lines_is_enough(tmp_path: Path) -> None:
    made = accepted(tmp_path, GOOD, "training.learning_rate=2e-5", "loss.triplet_margin=1")
    assert made.training.learning_rate == 2e-5
    assert made.loss.model_dump(exclude_none=True) == {
        "name": "TripletLoss",
        "distance_metric": "euclidean",
        "triplet_margin": 1.0,
    }


def test_an_override_replaces_the_whole_loss(tmp_path: Path) -> None:
    made = accepted(tmp_path, GOOD, "loss={name: MultipleNegativesRankingLoss, scale: 10}")
    assert made.loss.model_dump()["scale"] == 10


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    gist = {"name": "GISTEmbedLoss", "guide": "model"}
    made = accepted(tmp_path, {**GOOD, "storage": {"uri": "./here"}, "model": {"name_or_path": "model"}, "loss": gist})
    assert made.loss.model_dump()["guide"] == str(tmp_path / "model")
    assert made.storage.uri == str(tmp_path / "here")
    assert made.model.name_or_path == str(tmp_path / "model")
    assert accepted(tmp_path, GOOD).storage.uri == str(tmp_path / "tercet-store")


def test_addresses_and_hub_names_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert accepted(tmp_path, {**GOOD, "storage": {"uri": "s3://b/p"}}).storage.uri == "s3://b/p"
    assert accepted(tmp_path, {**GOOD, "storage": {"uri": "~/p"}}).storage.uri == str(tmp_path / "p")
    hub = accepted(tmp_path, {**GOOD, "model": {"name_or_path": "sentence-transformers/all-MiniLM-L6-v2"}})
    assert hub.model.name_or_path == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_version_of_digits_needs_quotes(tmp_path: Path) -> None:
    """A version id is hexadecimal: by chance it may look like a number, such as 12e45678."""
    message = refused(tmp_path, yaml.safe_dump(GOOD), "dataset.version=1234567812345678")
    assert message.endswith("`dataset.version` must be a string: put 1234567812345678 in quotes")
    assert accepted(tmp_path, GOOD, "dataset.version='12e45678'").dataset.version == "12e45678"


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().training.seed = 7  # type: ignore[misc]


def test_replay_cannot_be_used_with_mining(tmp_path: Path) -> None:
    both = {**GOOD, "dataset": {"name": "d", "replay": {}}, "nightly": {"mine": {"num_negatives": 2}}}
    message = refused(tmp_path, yaml.safe_dump(both))
    assert message.endswith(
        ":1:1: dataset.replay cannot be used with nightly.mine: all rows of a mined version are new"
    )


def test_a_slice_selects_texts_by_a_rule() -> None:
    rule = SliceConfig(matches="^git", max_chars=9)
    assert [rule.holds(text) for text in ("git add", "git commit", "to git")] == [True, False, False]
    with pytest.raises(ValidationError, match="is not a regular expression"):
        SliceConfig(matches="(")


def test_a_dataset_may_appear_once(tmp_path: Path) -> None:
    message = refused(tmp_path, yaml.safe_dump({**GOOD, "mix": [{"name": "e"}, {"name": "d"}, {"name": "e"}]}))
    assert message.endswith("`mix`: d, e given twice; to use rows more often, raise the dataset's weight")
    assert [part.name for part in accepted(tmp_path, {**GOOD, "mix": [{"name": "e"}, {"name": "f"}]}).mix] == ["e", "f"]


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", ".nan"])
def test_a_weight_is_a_number_above_0(tmp_path: Path, weight: str) -> None:
    text = yaml.safe_dump(GOOD) + "mix:\n- name: e\n  wieght: 1\n"
    message = refused(tmp_path, text, f"dataset.weight={weight}")
    assert f"--set dataset.weight={weight}: `dataset.weight`: input should be " in message
    assert "unknown key `mix.0.wieght`; did you mean `weight`?" in message


def test_the_schema_beside_the_recipes_is_in_sync() -> None:
    schema = json.loads((RECIPES_DIR / "recipe.schema.json").read_text())
    assert schema == Config.model_json_schema(), "run: tercet schema > src/tercet/config/recipes/recipe.schema.json"


@pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    made = load_config(path)
    assert made.name
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    schema = json.loads((RECIPES_DIR / "recipe.schema.json").read_text())
    document, _ = recipe_yaml.load(path)
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "nmae": 1}, schema)
