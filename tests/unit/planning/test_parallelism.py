"""The parallelism that is chosen, and the reasons and refusals in words."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from support.builders import config
from tercet.config.sections import Parallelism
from tercet.errors import PlanError
from tercet.planning.estimates import Kept
from tercet.planning.model_files import ModelFacts
from tercet.planning.parallelism import ZERO_STAGES, choose, shards_weights

BERT = ModelFacts(
    num_parameters=110_000_000, num_embedding_parameters=24_000_000, num_layers=12, hidden_size=768, max_seq_length=512
)


def test_which_modes_shard_the_weights() -> None:
    modes: tuple[Parallelism, ...] = ("ddp", "fsdp2", *ZERO_STAGES)
    assert [mode for mode in modes if shards_weights(mode)] == ["fsdp2", "zero3", "zero3_offload"]


def chosen(memory_bytes: float | None, facts: ModelFacts | None = BERT, **sections: Any) -> tuple[Parallelism, str]:
    sections.setdefault("workers", {"num_workers": 2})
    return choose(config(**sections), facts, Kept(0), None if memory_bytes is None else int(memory_bytes))


# BERT on two workers, without activations, in 1e6 bytes: ddp 1760, zero2 660 + 420 + 440, zero3 316 + 416 + 440,
# zero3_offload 96 + 196. On one: zero3_offload 292.
@pytest.mark.parametrize(
    ("memory_bytes", "parallelism", "price"),
    [
        (1960e6, "ddp", "no mode is faster"),
        (1950e6, "zero2", "and communicates as much as ddp"),
        (1690e6, "zero2", "and communicates as much as ddp"),
        (1680e6, "zero3", "and communicates 1.5 times as much as ddp"),
        (1310e6, "zero3", "and communicates 1.5 times as much as ddp"),
        (1300e6, "zero3_offload", "communicates 1.5 times as much as ddp, and moves weights to and from host memory"),
        (325e6, "zero3_offload", "communicates 1.5 times as much as ddp, and moves weights to and from host memory"),
    ],
)
def test_auto_chooses_the_least_communication_that_fits(memory_bytes: float, parallelism: str, price: str) -> None:
    mode, reason = chosen(memory_bytes)
    assert mode == parallelism
    assert reason.startswith("auto: ")
    assert price in reason


def test_the_reason_has_the_numbers() -> None:
    assert chosen(1680e6)[1] == (
        "auto: a worker may use 90% of its 1.6 GiB; ddp 1.6 GiB, zero2 1.4 GiB would be too much; "
        "zero3 needs 1.1 GiB and communicates 1.5 times as much as ddp"
    )


def test_auto_for_one_worker() -> None:
    alone = {"workers": {"num_workers": 1}}
    assert chosen(1960e6, **alone)[0] == "ddp"
    mode, reason = chosen(1950e6, **alone)
    assert mode == "zero3_offload"
    assert "zero2" not in reason
    assert "communicates" not in reason


def test_auto_without_facts_chooses_ddp_and_explains_how_to_change_it() -> None:
    assert chosen(None)[0] == chosen(1, facts=None)[0] == "ddp"
    assert "set workers.memory_gib_per_worker" in chosen(None)[1]
    assert "until its files are on this machine" in chosen(1, facts=None)[1]


@pytest.mark.parametrize("arguments", [(None,), (1e12,), (1e12, None)])
def test_auto_reports_unused_deepspeed_settings(arguments: tuple[Any, ...]) -> None:
    workers = {"num_workers": 2, "deepspeed": {"steps_per_print": 1}}
    assert chosen(*arguments, workers=workers)[1].endswith("workers.deepspeed is not used")
    assert "is not used" not in chosen(*arguments)[1]
    assert "is not used" not in chosen(1680e6, workers=workers)[1]


@pytest.mark.parametrize("parallelism", get_args(Parallelism))
def test_a_mode_of_the_recipe_is_always_used(parallelism: str) -> None:
    mode, reason = chosen(1, workers={"num_workers": 2, "parallelism": parallelism})
    assert (mode, reason) == (parallelism, "as the recipe says")


def test_nothing_fits() -> None:
    with pytest.raises(PlanError) as caught:
        chosen(324e6)
    assert "ddp 1.6 GiB, zero2 1.4 GiB, zero3 1.1 GiB, zero3_offload 278.5 MiB" in caught.value.message
    assert "may use 90% of its 309.0 MiB" in caught.value.message
    assert caught.value.hint == (
        "any of these helps: more workers, smaller micro-batches (raise training.gradient_accumulation_steps), "
        "training.gradient_checkpointing: true, training.precision: bf16, model.lora"
    )
    with pytest.raises(PlanError) as caught:
        chosen(
            1,
            training={
                "global_batch_size": 2,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": True,
                "precision": "bf16",
            },
            model={"lora": {}},
        )
    assert caught.value.hint == "any of these helps: more workers"


def test_fp16_is_never_sharded() -> None:
    fp16 = {"precision": "fp16"}
    assert chosen(2500e6, training=fp16)[0] == "ddp"
    with pytest.raises(PlanError) as caught:
        chosen(1900e6, training=fp16)
    assert "zero" not in caught.value.message
    assert "training.precision: bf16, which every mode can use" in caught.value.hint
    for arguments in ((None,), (1e12, None)):
        assert chosen(*arguments, training=fp16)[1] == "auto: training.precision=fp16 works with no other mode"


def test_a_cpu_worker_has_nowhere_to_offload_to() -> None:
    assert chosen(1310e6, workers={"num_workers": 2, "use_gpu": False})[0] == "zero3"
    with pytest.raises(PlanError) as caught:
        chosen(1300e6, workers={"num_workers": 2, "use_gpu": False})
    assert "offload" not in caught.value.message


def test_the_choice_depends_on_the_training_section() -> None:
    workers = {"num_workers": 2}
    assert chosen(1000e6, workers=workers, model={"lora": {}})[0] == "ddp"
    # 1e5 tokens of activations are 68.2e9 bytes; with checkpointing and in 16 bits 7.6e9.
    small = config(workers=workers, training={"gradient_checkpointing": True, "precision": "bf16"})
    assert choose(small, BERT, Kept(1e5), 12 * 10**9)[0] == "ddp"
    with pytest.raises(PlanError):
        choose(config(workers=workers), BERT, Kept(1e5), 12 * 10**9)
    # A cached loss keeps zero2's gradients whole: 220e6 bytes more.
    assert chosen(1700e6, loss={"name": "CachedMultipleNegativesRankingLoss"})[0] != "zero2"
