"""The plan of a recipe on made-up manifests. All impossible combinations are reported at once."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from support.builders import TODAY, config, manifest, mixed_manifest, plan, plan_of
from tercet.data.versions import publish, read_manifest
from tercet.errors import PlanError
from tercet.planning import packing
from tercet.planning.dataset_plan import FoundDataset
from tercet.planning.plan import Findings, TrainPlan, _most_kept, make_run_id
from tercet.storage import open_storage


def refused(version: Any = None, **sections: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_of(config(**sections), version or manifest())
    return caught.value


def test_storage_accepts_the_manifest_of_these_tests(tmp_path: Any) -> None:
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


def test_the_memory_shown_is_that_of_the_precision_that_a_gpu_chooses() -> None:
    unset, named = (plan(training=training, workers={"use_gpu": True}) for training in ({}, {"precision": "bf16"}))
    assert unset.memory == named.memory != plan(training={"precision": "fp32"}, workers={"use_gpu": True}).memory


def test_sizes_come_from_the_model_and_are_unknown_without_it() -> None:
    known = plan(workers={"use_gpu": False})
    assert known.checkpoint_bytes == 12 * 1000
    # Three texts of 40 / 4 + 2 tokens a row, 10 rows, 2 layers of width 16.
    assert known.memory is not None
    assert known.memory.total_bytes == 16 * 1000 + 10 * 36 * 2 * 16 * 74
    assert known.training_seconds == pytest.approx(6 * 600 * 20 * 10 * 36 / 30e9)
    unknown = plan_of(config(), manifest(), model=None)
    assert (unknown.checkpoint_bytes, unknown.memory, unknown.training_seconds) == (None, None, None)
    assert plan(workers={"use_gpu": True}).training_seconds is None


def test_longer_texts_are_cut() -> None:
    cut = plan(model={"max_seq_length": 4}, workers={"use_gpu": False})
    assert cut.memory is not None
    assert cut.memory.activations_bytes == 10 * 12 * 2 * 16 * 74


def test_micro_batches_and_the_mini_batches_of_a_cached_loss_decide_the_activations() -> None:
    def activations(**sections: Any) -> float:
        memory = plan(**sections).memory
        assert memory is not None
        return memory.activations_bytes / (2 * 16 * 74)

    assert activations() == 10 * 36
    assert activations(training={"gradient_accumulation_steps": 5}) == 2 * 36
    assert activations(workers={"num_workers": 5}) == 2 * 36
    cached = {"name": "CachedMultipleNegativesRankingLoss"}
    assert activations(loss={**cached, "mini_batch_size": 3}) == 3 * 12  # texts of one column, not rows
    assert activations(loss={**cached, "mini_batch_size": 99}) == 10 * 12
    assert activations(loss={**cached, "mini_batch_num_tokens": 50}) == 50


def test_a_cached_loss_matters_if_gradients_are_sharded() -> None:
    workers = {"num_workers": 2, "parallelism": "zero2"}
    cached, plain = (
        plan(loss={"name": name}, workers=workers).memory
        for name in ("CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss")
    )
    assert cached is not None
    assert plain is not None
    assert cached.gradients_bytes - plain.gradients_bytes == 4 * 1000 / 2


def test_an_adapter_has_a_small_state() -> None:
    adapter = 18 * 4 * 16 * 2  # rank 4, two layers of width 16
    made = plan(model={"lora": {"rank": 4}})
    assert made.checkpoint_bytes == 4 * 1000 + 8 * adapter
    assert made.memory is not None
    assert made.memory.optimizer_bytes == 8 * adapter


def test_the_plan_names_a_parallelism() -> None:
    made = plan()
    assert (made.parallelism, made.memory_bytes_available, made.memory_warning) == ("ddp", None, None)
    assert "workers.memory_gib_per_worker" in made.parallelism_reason
    named = plan(workers={"parallelism": "zero3", "num_workers": 2})
    assert (named.parallelism, named.parallelism_reason) == ("zero3", "as the recipe says")


def test_the_memory_of_the_recipe_takes_precedence() -> None:
    def available(share: int | None, **workers: Any) -> int | None:
        return plan_of(config(workers=workers), manifest(), cpu_worker_bytes=share).memory_bytes_available

    assert available(2**30, use_gpu=False) == 2**30
    assert available(2**30, use_gpu=False, memory_gib_per_worker=1.5) == 3 * 2**29
    assert available(2**30, use_gpu=True) is None  # this machine's memory says nothing about a GPU's
    assert available(2**30) is None


def test_a_mode_of_the_recipe_that_does_not_fit_is_used_with_a_warning() -> None:
    tight = {"num_workers": 2, "memory_gib_per_worker": 0.1}
    made = plan(workers={**tight, "parallelism": "zero1"})
    assert made.parallelism == "zero1"
    assert made.memory_warning is not None
    assert made.memory_warning.startswith("zero1 needs 19")
    assert "more than 90% of the 102.4 MiB a worker has" in made.memory_warning
    assert plan(workers=tight).memory_warning is None


def test_a_model_that_fits_nowhere() -> None:
    small = {"memory_gib_per_worker": 0.0001}
    error = refused(manifest(eval_=0), workers=small)
    assert len(error.message.splitlines()) == 2  # the other problem is reported too
    assert "the model does not fit into a worker" in error.message
    assert "model.lora" in error.hint
    assert plan(workers={**small, "parallelism": "ddp"}).memory_warning is not None


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_deepspeed_settings_without_deepspeed(parallelism: str) -> None:
    workers = {"num_workers": 2, "parallelism": parallelism, "deepspeed": {"steps_per_print": 1}}
    error = refused(workers=workers)
    assert f"workers.deepspeed is given, but workers.parallelism={parallelism}" in error.message
    assert "zero2" in error.hint
    assert plan(workers={**workers, "parallelism": "zero1"}).parallelism == "zero1"


def test_one_worker() -> None:
    assert "parallelism=fsdp2 needs more than one worker" in refused(workers={"parallelism": "fsdp2"}).message
    assert plan(workers={"parallelism": "fsdp2", "num_workers": 2}).parallelism == "fsdp2"
    for parallelism in ("zero1", "zero2", "zero3"):
        made = plan(workers={"parallelism": parallelism})
        assert made.parallelism_reason == "as the recipe says; with one worker nothing is sharded"


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_precision_that_needs_a_gpu(precision: str) -> None:
    error = refused(training={"precision": precision}, workers={"use_gpu": False})
    assert error.message == f"training.precision={precision} needs a GPU, but workers.use_gpu is false"
    assert plan(training={"precision": precision}).config.training.precision == precision
    assert plan(training={"precision": "bf16"}, workers={"use_gpu": False}).config.training.precision == "bf16"


@pytest.mark.parametrize("parallelism", ["zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_fp16_works_with_ddp_only(parallelism: str) -> None:
    training = {"precision": "fp16"}
    error = refused(training=training, workers={"num_workers": 2, "parallelism": parallelism})
    assert error.message.startswith(f"training.precision=fp16 cannot be used with workers.parallelism={parallelism}: ")
    assert error.hint == "choose training.precision: bf16, or workers.parallelism: ddp"
    for allowed in ("ddp", "auto"):
        assert plan(training=training, workers={"num_workers": 2, "parallelism": allowed}).parallelism == "ddp"


def test_a_batch_that_cannot_be_shared() -> None:
    error = refused(workers={"num_workers": 4}, training={"gradient_accumulation_steps": 2})
    assert "global_batch_size=10 cannot be shared by 4 workers × 2 accumulation steps" in error.message  # noqa: RUF001
    assert error.hint == "make it a multiple of 8, such as 8"


def test_too_few_rows() -> None:
    assert "9 train rows of poems do not fill one global batch of 10" in refused(manifest(train=9)).message
    assert "5 train rows of poems do not fill" in refused(training={"max_train_rows": 5}).message


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_split_without_rows(split: str) -> None:
    empty = manifest(eval_=0) if split == "eval" else manifest(test=0)
    assert f"has no {split} rows" in refused(empty).message


def test_what_needs_a_negative() -> None:
    pairs = manifest(columns=("anchor", "positive"))
    assert plan_of(config(), pairs).columns == ("anchor", "positive")
    loss = refused(pairs, loss={"name": "TripletLoss"}).message
    assert loss.startswith("loss.name=TripletLoss needs a column `negative`;")
    assert loss.endswith("has anchor, positive")
    metric = refused(pairs, evaluation={"metric": "triplet_accuracy"}).message
    assert metric.startswith("evaluation.metric=triplet_accuracy needs a column `negative`;")


def test_a_single_row_has_nothing_to_be_compared_with() -> None:
    pairs = manifest(columns=("anchor", "positive"))
    alone = {"global_batch_size": 4, "gradient_accumulation_steps": 4}
    message = refused(pairs, training=alone, workers={"num_workers": 1}).message
    assert "each of the 4 micro-batches has one row" in message
    assert plan(training=alone, workers={"num_workers": 1}).steps_per_epoch  # a negative of its own


def test_an_automatic_accumulation_needs_the_trial() -> None:
    error = refused(
        training={"gradient_accumulation_steps": "auto"},
        workers={"try_longest_batch": False},
        loss={"name": "TripletLoss"},
    )
    assert "workers.try_longest_batch: false switches off" in error.message


@pytest.mark.parametrize(
    ("loss", "negatives", "need", "advice"),
    [
        (
            {"name": "TripletLoss"},
            ("negative_1", "negative_2"),
            "works with one negative per row",
            "with one --negative",
        ),
        ({"name": "AnglELoss"}, (), "needs a column `negative`", "with --negative"),
        (
            {"name": "MegaBatchMarginLoss"},
            ("negative",),
            "uses only other rows' positives as negatives",
            "without --negative",
        ),
        (
            {"name": "MultipleNegativesRankingLoss", "hardness_mode": "hard_negatives", "hardness_strength": 5},
            (),
            "with hardness_mode=hard_negatives needs a column `negative`",
            "with --negative",
        ),
    ],
)
def test_columns_that_the_loss_does_not_work_with(
    loss: dict[str, Any], negatives: tuple[str, ...], need: str, advice: str
) -> None:
    columns = ("anchor", "positive", *negatives)
    version = manifest(columns=(*columns, "group"))
    error = refused(version, loss=loss)
    assert error.message == f"loss.name={loss['name']} {need}; poems {version.version} has {', '.join(columns)}"
    assert error.hint.startswith(f"shard the data {advice}, or ")


def test_several_negatives() -> None:
    columns = ("anchor", "positive", "negative_1", "negative_2")
    assert plan_of(config(), manifest(columns=columns)).columns == columns


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
    first = make_run_id(config(), [version], TODAY)
    assert first == f"20260314-made-{config().experiment_hash()}-{version[:8]}" == plan().run_id
    assert make_run_id(config(workers={"num_workers": 8}), [version], TODAY) == first
    assert make_run_id(config(), [version], TODAY + datetime.timedelta(days=1)) != first
    assert make_run_id(config(training={"seed": 7}), [version], TODAY) != first
    assert make_run_id(config(), [manifest(train=106).version], TODAY) != first
    assert plan_of(config(), manifest(), run_id="mine").run_id == "mine"


def test_the_run_id_names_the_versions_of_a_mix() -> None:
    mixed = config(mix=[{"name": "docs"}])
    ids = [make_run_id(mixed, versions, TODAY) for versions in (["a", "b"], ["a", "c"], ["c", "b"], ["b", "a"], ["a"])]
    assert len(set(ids)) == 5
    assert ids[0] == make_run_id(mixed, ["a", "b"], TODAY)
    version, docs = manifest().version, mixed_manifest("docs").version
    assert plan(mix=[{"name": "docs"}]).run_id == make_run_id(mixed, [version, docs], TODAY)


MIX = [{"name": "docs", "weight": 0.5}, {"name": "faq", "weight": 3}]


def test_a_mix() -> None:
    made = plan(mix=MIX)
    assert [(part.name, part.num_train_rows, part.steps_per_epoch) for part in made.datasets] == [
        ("poems", 105, 10),
        ("docs", 50, 2),
        ("faq", 50, 15),
    ]
    assert [part.version for part in made.datasets] == [
        manifest().version,
        *(mixed_manifest(name).version for name in ("docs", "faq")),
    ]
    assert made.datasets[1].columns == ("anchor", "positive")
    assert made.columns == ("anchor", "positive", "negative")  # of the dataset to measure on
    assert made.num_rows == {"train": 105, "eval": 20, "test": 30}
    assert (made.num_train_rows, made.num_dropped_rows) == (205, 5)
    assert (made.steps_per_epoch, made.num_steps, made.evaluation_steps) == (27, 54, (0, 27, 54))
    assert [share.split(": ")[1] for share in made.shares] == [
        "105 train rows, weight 1, 10 steps an epoch",
        "50 train rows, weight 0.5, 2 steps an epoch",
        "50 train rows, weight 3, 15 steps an epoch",
    ]


def test_one_dataset_has_shares_only_with_a_weight() -> None:
    assert plan().shares == ()
    twice = plan(dataset={"weight": 2})
    assert (twice.steps_per_epoch, twice.num_train_rows, twice.num_dropped_rows) == (20, 105, 5)
    assert len(twice.shares) == 1


def test_max_train_rows_is_for_each_dataset() -> None:
    made = plan(mix=MIX, training={"max_train_rows": 30})
    assert [part.num_train_rows for part in made.datasets] == [30, 30, 30]
    assert made.steps_per_epoch == 3 + 2 + 9  # 1.5, rounded to the even number


def test_a_mix_counts_for_memory_and_time() -> None:
    workers = {"use_gpu": False}
    pairs = manifest(columns=("anchor", "positive"))
    alone = plan_of(config(workers=workers), pairs)
    triplets = manifest(50, dataset="docs")
    recipe = config(workers=workers, mix=[{"name": "docs"}])
    mixed = plan_of(recipe, pairs, triplets)
    assert mixed.memory == plan(workers=workers).memory != alone.memory  # the larger batch decides
    assert mixed.training_seconds == pytest.approx(6 * 600 * 2 * 10 * (10 * 24 + 5 * 36) / 30e9)


def test_problems_of_a_mix() -> None:
    recipe = config(loss={"name": "TripletLoss"}, mix=[{"name": "docs"}, {"name": "faq", "weight": 0.05}])
    mix = [mixed_manifest("docs", 9), manifest(dataset="faq")]
    with pytest.raises(PlanError) as caught:
        plan_of(recipe, manifest(), *mix)
    assert caught.value.message.splitlines() == [
        "9 train rows of docs do not fill one global batch of 10",
        f"loss.name=TripletLoss needs a column `negative`; docs {mix[0].version} has anchor, positive",
        "with weight 0.05, faq contributes no batch to an epoch: its train rows make 10 global batches",
    ]
    assert caught.value.hint.endswith("raise the weight to 0.1 or more")


def test_a_mix_needs_no_negatives_and_no_held_out_rows() -> None:
    made = plan(mix=MIX, evaluation={"metric": "triplet_accuracy"})  # no eval and test rows, and no negatives
    assert len(made.datasets) == 3


def test_a_plan_is_the_same_after_a_round_trip_through_json() -> None:
    for made in (plan(), plan(mix=MIX)):
        assert TrainPlan.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("parallelism", "number"),
    [
        ("fsdp2", {"num_workers": 2}),
        ("zero3", {"num_workers": 2}),
        ("zero3", {"min": 1, "max": 2}),
        ("zero3_offload", {"min": 1, "max": 2}),
    ],
)
def test_mini_batches_by_tokens_are_refused_with_sharded_weights(parallelism: str, number: dict[str, int]) -> None:
    """Each mini-batch gathers the weights on all ranks, and ranks would have unequal numbers of mini-batches."""
    loss = {"name": "CachedMultipleNegativesRankingLoss", "mini_batch_num_tokens": 50}
    workers = {**number, "parallelism": parallelism}
    with pytest.raises(PlanError, match=f"mini_batch_num_tokens=50 cannot be used with {parallelism}"):
        plan(loss=loss, workers=workers)
    assert plan(loss={**loss, "mini_batch_num_tokens": None}, workers=workers)
    assert plan(loss=loss, workers={**workers, "parallelism": "zero2"})


def test_a_fused_kernel_on_a_gpu_keeps_no_attention_weights() -> None:
    def kept(use_gpu: bool, fused: bool) -> float:
        recipe = config(workers={"use_gpu": use_gpu})
        facts = packing.Facts(model_type="bert", own_code=False, is_cached=False)
        findings = Findings("mine", (FoundDataset(recipe.dataset, manifest()),), None, facts, has_fused_attention=fused)
        return _most_kept(recipe, findings).attention_bytes

    assert kept(True, True) == 0.0
    assert kept(True, False) == kept(False, True) == kept(False, False) > 0.0
