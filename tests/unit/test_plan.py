"""Everything is derived from the recipe and the manifest, and wrong combinations are told all at once."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from made import FACTS, TODAY, config, manifest, plan
from tercet.errors import PlanError
from tercet.manifest import publish, read_manifest
from tercet.plan import TrainPlan, make_plan, make_run_id
from tercet.storage import open_storage


def refused(found: Any = None, **sections: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        make_plan(config(**sections), found or manifest(), FACTS, TODAY)
    return caught.value


def test_the_manifest_made_by_hand_is_one_that_storage_takes(tmp_path: Any) -> None:
    storage = open_storage(str(tmp_path))
    assert publish(storage, manifest()) == read_manifest(storage, "poems") == manifest()


def test_steps_batches_and_evaluations() -> None:
    made = plan(workers={"num_workers": 5}, training={"warmup_ratio": 0.11})
    assert made.num_rows == {"train": 105, "eval": 20, "test": 30}
    assert (made.steps_per_epoch, made.num_steps, made.num_dropped_rows) == (10, 20, 5)
    assert made.warmup_steps == 3  # 2.2, rounded up
    assert made.evaluation_steps == (0, 10, 20)
    assert made.rows_per_rank_and_micro_batch == 2
    assert made.columns == ("anchor", "positive", "negative")  # `group` is not encoded
    assert made.metric == "ndcg@10"


def test_accumulation_divides_the_batch_and_not_the_steps() -> None:
    made = plan(workers={"num_workers": 5}, training={"gradient_accumulation_steps": 2})
    assert (made.rows_per_rank_and_micro_batch, made.num_steps) == (1, 20)


def test_max_train_rows() -> None:
    assert plan(training={"max_train_rows": 34}).num_train_rows == 34
    assert plan(training={"max_train_rows": 34}).num_steps == 6
    assert plan(training={"max_train_rows": 1000}).num_train_rows == 105


def test_no_warm_up() -> None:
    assert plan(training={"warmup_ratio": 0}).warmup_steps == 0


def test_sizes_come_from_the_model_and_are_unknown_without_it() -> None:
    known = plan(workers={"use_gpu": False})
    assert known.checkpoint_bytes == 12 * 1000
    # Three texts of 40 / 4 + 2 tokens a row, 10 rows, 2 layers of width 16.
    assert known.memory_bytes_per_worker == 16 * 1000 + 10 * 36 * 2 * 16 * 68
    assert known.training_seconds == pytest.approx(6 * 600 * 20 * 10 * 36 / 30e9)
    unknown = make_plan(config(), manifest(), None, TODAY)
    assert (unknown.checkpoint_bytes, unknown.memory_bytes_per_worker, unknown.training_seconds) == (None, None, None)
    assert plan(workers={"use_gpu": True}).training_seconds is None


def test_longer_texts_are_cut() -> None:
    cut = plan(model={"max_seq_length": 4}, workers={"use_gpu": False})
    assert cut.memory_bytes_per_worker == 16 * 1000 + 10 * 12 * 2 * 16 * 68


def test_a_batch_that_cannot_be_shared() -> None:
    error = refused(workers={"num_workers": 4}, training={"gradient_accumulation_steps": 2})
    assert "global_batch_size=10 cannot be shared by 4 workers × 2 accumulation steps" in error.message  # noqa: RUF001
    assert error.hint == "make it a multiple of 8, such as 8"


def test_too_few_rows() -> None:
    assert "9 train rows do not fill one global batch of 10" in refused(manifest(train=9)).message
    assert "5 train rows do not fill" in refused(training={"max_train_rows": 5}).message


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_split_without_rows(split: str) -> None:
    empty = manifest(eval_=0) if split == "eval" else manifest(test=0)
    assert f"has no {split} rows" in refused(empty).message


def test_what_needs_a_negative() -> None:
    pairs = manifest(columns=("anchor", "positive"))
    assert make_plan(config(), pairs, FACTS, TODAY).columns == ("anchor", "positive")
    loss = refused(pairs, loss={"name": "TripletLoss"}).message
    assert loss.startswith("loss.name=TripletLoss needs a column `negative`;")
    assert loss.endswith("has anchor, positive")
    metric = refused(pairs, evaluation={"metric": "triplet_accuracy"}).message
    assert metric.startswith("evaluation.metric=triplet_accuracy needs a column `negative`;")


def test_every_problem_is_listed() -> None:
    error = refused(
        manifest(train=5, eval_=0, test=0, columns=("anchor", "positive")),
        workers={"num_workers": 3},
        loss={"name": "TripletLoss"},
        evaluation={"metric": "triplet_accuracy"},
    )
    assert len(error.message.splitlines()) == 6
    assert error.hint.count(";") == 5


def test_the_run_id_is_stable_and_names_day_recipe_and_data() -> None:
    version = manifest().version
    first = make_run_id(config(), version, TODAY)
    assert first == f"20260314-made-{config().experiment_hash()}-{version[:8]}" == plan().run_id
    assert make_run_id(config(workers={"num_workers": 8}), version, TODAY) == first
    assert make_run_id(config(), version, TODAY + datetime.timedelta(days=1)) != first
    assert make_run_id(config(training={"seed": 7}), version, TODAY) != first
    assert make_run_id(config(), manifest(train=106).version, TODAY) != first
    assert make_plan(config(), manifest(), FACTS, TODAY, run_id="mine").run_id == "mine"


def test_a_plan_survives_the_way_to_the_workers() -> None:
    assert TrainPlan.model_validate_json(plan().model_dump_json()) == plan()
