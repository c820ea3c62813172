"""The hash of a recipe: it changes with whatever decides the result, and never with an update of tercet."""

from __future__ import annotations

from typing import Any

import pytest

from support.builders import config
from tercet.config.examples import example_path
from tercet.config.losses import MatryoshkaConfig, TripletLossConfig
from tercet.config.recipe import Config, load_config
from tercet.config.sections import (
    CheckpointConfig,
    DatasetConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    Section,
    TrainingConfig,
)

ANOTHER: dict[str, dict[str, Any]] = {
    "model": {
        "name_or_path": "other/model",
        "revision": "abc",
        "sha256": "0" * 64,
        "trust_remote_code": True,
        "max_seq_length": 64,
        "pooling": "cls",
        "dense_features": 8,
        "config_kwargs": {"a": 1},
        "prompts": {"query": "q: "},
        "lora": {"rank": 4},
        "start_from": "champion",
    },
    "training": {
        "seed": 7,
        "num_epochs": 3,
        "global_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "no_duplicates": False,
        "last_batch": "keep",
        "max_train_rows": 10,
        "deterministic": True,
        "log_every_steps": 3,
    },
    "evaluation": {"metric": "mrr@10", "batch_size": 8},
}


def test_another_value_is_known_for_every_field() -> None:
    sections = {name: set(section) for name, section in ANOTHER.items()}
    assert sections == {name: set(Config.model_fields[name].annotation.model_fields) for name in ANOTHER}  # type: ignore[union-attr]


@pytest.mark.parametrize(("section", "key"), [(section, key) for section in ANOTHER for key in ANOTHER[section]])
def test_the_hash_changes_with_every_field_of_the_experiment(section: str, key: str) -> None:
    changed = config(**{section: {key: ANOTHER[section][key]}})
    assert changed != config()
    assert changed.experiment_hash() != config().experiment_hash()


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "TripletLoss"},
        {"name": "TripletLoss", "distance_metric": "cosine"},
        {"name": "TripletLoss", "triplet_margin": 1},
        {"name": "MultipleNegativesRankingLoss", "scale": 10},
        {"name": "MultipleNegativesRankingLoss", "gather_across_devices": False},
        {"name": "MultipleNegativesRankingLoss", "matryoshka": {"dims": [8]}},
    ],
    ids=str,
)
def test_the_hash_changes_with_the_loss(loss: dict[str, Any]) -> None:
    others = [config(), config(loss={"name": "TripletLoss"})]
    assert config(loss=loss).experiment_hash() not in {o.experiment_hash() for o in others if o != config(loss=loss)}
    assert config(loss=loss).experiment_hash() != config().experiment_hash()


def test_the_hash_ignores_where_it_runs() -> None:
    elsewhere = config(
        storage={"uri": "s3://b", "endpoint_url": "https://h"},
        workers={"num_workers": 8, "use_gpu": True, "cpus_per_worker": 4, "max_failures": 0, "cache_dir": "/tmp"},
        dataset={"version": "0123456789abcdef"},
        gate={"alpha": 0.05, "seed": 1},
        nightly={"sources": ["incoming/*.jsonl"], "begins_at_utc_hour": 6},
    )
    assert elsewhere.experiment_hash() == config().experiment_hash()
    assert len(config().experiment_hash()) == 8


def test_the_hash_changes_with_replay() -> None:
    replays: list[dict[str, Any]] = [{}, {"new_share": 0.3}, {"half_life_versions": 7}]
    hashes = {config(dataset={"replay": replay}).experiment_hash() for replay in replays}
    assert len(hashes | {config().experiment_hash()}) == 4


DOCS = {"name": "docs", "version": "0123456789abcdef", "weight": 0.5}


@pytest.mark.parametrize(
    "changed",
    [
        {"mix": []},
        {"mix": [DOCS, {"name": "faq"}]},
        {"mix": [{**DOCS, "name": "faq"}]},
        {"mix": [{**DOCS, "weight": 1}]},
        {"dataset": {"weight": 2}},
        {"dataset": {"name": "songs"}},
    ],
    ids=str,
)
def test_the_hash_changes_with_the_mix(changed: dict[str, Any]) -> None:
    base = config(mix=[DOCS])
    assert config(**{"mix": [DOCS], **changed}).experiment_hash() != base.experiment_hash()
    assert config(mix=[{**DOCS, "version": "latest"}]).experiment_hash() == base.experiment_hash()


# The hashes below are those of commit 393eb53, with the default recipe of builders.config().
GUIDE = {"guide": "a/guide"}
MATRYOSHKA = {"matryoshka": {"dims": [8, 4]}}
REPLAY: dict[str, Any] = {"replay": {"half_life_versions": 3}}
NIGHT: dict[str, Any] = {
    "nightly": {"sources": ["x"], "mine": {"num_negatives": 2}},
    "gate": {"alpha": 0.05},
    "checkpoint": {"every_steps": 3},
    "storage": {"uri": "s3://b"},
}
MODEL: dict[str, Any] = {
    "name_or_path": "m",
    "lora": {"rank": 4, "target_modules": ["query", "value"]},
    "start_from": "champion",
    "prompts": {"query": "q: "},
    "config_kwargs": {"a": {"b": [1, 2.5, None]}},
}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "370c47fc"),
        ({"loss": {"name": "TripletLoss"}}, "b2b5048e"),
        ({"loss": {"name": "TripletLoss", **MATRYOSHKA}}, "a2eaca3d"),
        ({"loss": {"name": "MultipleNegativesRankingLoss", **MATRYOSHKA}}, "43dff10f"),
        ({"loss": {"name": "CachedMultipleNegativesRankingLoss"}}, "df18dc34"),
        ({"loss": {"name": "CachedMultipleNegativesRankingLoss", **MATRYOSHKA}}, "e7553ec8"),
        ({"loss": {"name": "MultipleNegativesSymmetricRankingLoss"}}, "b5a29f0c"),
        ({"loss": {"name": "MultipleNegativesSymmetricRankingLoss", **MATRYOSHKA}}, "199ea78c"),
        ({"loss": {"name": "CachedMultipleNegativesSymmetricRankingLoss"}}, "d4ca7b6e"),
        ({"loss": {"name": "CachedMultipleNegativesSymmetricRankingLoss", **MATRYOSHKA}}, "61acc053"),
        ({"loss": {"name": "MegaBatchMarginLoss"}}, "368441a4"),
        ({"loss": {"name": "MegaBatchMarginLoss", **MATRYOSHKA}}, "d8b98e63"),
        ({"loss": {"name": "GISTEmbedLoss", **GUIDE}}, "6b3c79e2"),
        ({"loss": {"name": "GISTEmbedLoss", **GUIDE, **MATRYOSHKA}}, "7f956537"),
        ({"loss": {"name": "CachedGISTEmbedLoss", **GUIDE}}, "033e8432"),
        ({"loss": {"name": "CachedGISTEmbedLoss", **GUIDE, **MATRYOSHKA}}, "20cf4ff6"),
        ({"loss": {"name": "AnglELoss"}}, "f958479c"),
        ({"loss": {"name": "AnglELoss", **MATRYOSHKA}}, "fb45453b"),
        ({"dataset": {"weight": 1}, "mix": []}, "370c47fc"),
        ({"mix": [{"name": "docs"}]}, "ba69458a"),
        ({"mix": [{"name": "docs", "weight": 0.5}, {"name": "faq", "version": "0123456789abcdef"}]}, "c53010d9"),
        ({"mix": [{"name": "docs", "replay": {}}], "dataset": {"weight": 2, **REPLAY}}, "fbc9b7d9"),
        ({"model": {"name_or_path": "m", "lora": {}}}, "ecb01892"),
        ({"model": MODEL}, "c2d3be58"),
        ({"workers": {"min": 1, "max": 4}}, "370c47fc"),
        ({"workers": {"num_workers": 3, "deepspeed": {"steps_per_print": 1}}}, "370c47fc"),
        (NIGHT, "370c47fc"),
        ({"evaluation": {"metric": "mrr@10"}}, "910baab4"),
    ],
    ids=str,
)
def test_the_hash_is_the_same_in_every_version(sections: dict[str, Any], expected: str) -> None:
    """Otherwise a run that is submitted again after an update of tercet would not resume."""
    assert config(**sections).experiment_hash() == expected


@pytest.mark.parametrize(("name", "expected"), [("demo", "374c192c"), ("stella_triplet", "2a43b896")])
def test_the_hashes_of_the_examples(name: str, expected: str) -> None:
    assert load_config(example_path(name)).experiment_hash() == expected


class LaterSection(Section):
    depth: int = 0
    width: int = 0


class LaterDataset(DatasetConfig):
    later: int = 0


class LaterTraining(TrainingConfig):
    later: int = 0
    section: LaterSection = LaterSection()
    optional: LaterSection | None = None


class LaterLora(LoraConfig):
    later: int = 0


class LaterModel(ModelConfig):
    lora: LaterLora | None = None


class LaterMatryoshka(MatryoshkaConfig):
    later: int = 0


class LaterLoss(TripletLossConfig):
    scale: float = 20.0  # a name that other losses have had from the start
    matryoshka: LaterMatryoshka | None = None


class LaterEvaluation(EvaluationConfig):
    later: tuple[LaterSection, ...] = ()


class LaterCheckpoint(CheckpointConfig):
    later: int = 0


class LaterConfig(Config):
    """A recipe of a later tercet, with new fields in old sections and with new sections."""

    dataset: LaterDataset
    mix: tuple[LaterDataset, ...] = ()
    model: LaterModel
    loss: LaterLoss  # type: ignore[assignment]
    training: LaterTraining = LaterTraining()
    evaluation: LaterEvaluation = LaterEvaluation()
    checkpoint: LaterCheckpoint = LaterCheckpoint()
    later: LaterSection = LaterSection()


WITH_ALL: dict[str, Any] = {
    "name": "made",
    "dataset": {"name": "poems"},
    "mix": [{"name": "docs"}],
    "model": {"name_or_path": "m", "lora": {}},
    "loss": {"name": "TripletLoss", "matryoshka": {"dims": [8]}},
}


def later_hash(path: str = "", value: Any = None) -> str:
    """Hash of the recipe in a later tercet, with a value at a dotted path."""
    made = LaterConfig.model_validate(WITH_ALL).model_dump()
    section, keys = made, [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in keys[:-1]:
        section = section[key]
    if path:
        section[keys[-1]] = value
    return LaterConfig.model_validate(made).experiment_hash()


def test_a_later_field_at_its_default_does_not_rename_a_run() -> None:
    assert later_hash() == Config.model_validate(WITH_ALL).experiment_hash()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dataset.later", 1),
        ("mix.0.later", 1),
        ("model.lora.later", 1),
        ("loss.scale", 10.0),
        ("loss.matryoshka.later", 1),
        ("training.later", 1),
        ("training.section.depth", 1),
        ("training.optional", {}),
        ("training.optional", {"depth": 1}),
        ("evaluation.later", [{}]),
        ("evaluation.later", [{"depth": 1}]),
        ("later.depth", 1),
        ("later.width", 1),
    ],
)
def test_a_later_field_counts_when_it_is_set(path: str, value: Any) -> None:
    assert later_hash(path, value) != later_hash()


def test_later_fields_are_told_apart() -> None:
    assert len({later_hash("later.depth", 1), later_hash("later.width", 1), later_hash("later.depth", 2)}) == 3


def test_a_later_field_of_a_section_that_is_not_of_the_experiment() -> None:
    assert later_hash("checkpoint.later", 1) == later_hash()
