"""The estimated memory of a worker, compared with numbers computed by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from typing import Any, get_args

import pytest

from support.builders import config, manifest
from support.commands import REPOSITORY
from tercet.config.sections import LoraConfig, Parallelism, TrainingConfig, WorkersConfig
from tercet.data.manifest import TextStatistics
from tercet.planning.estimates import (
    GPU_OVERHEAD_BYTES,
    Kept,
    Memory,
    fits,
    kept_for_backward,
    memory_of,
    num_trainable_parameters,
    size_text,
)
from tercet.planning.model_files import ModelFacts
from tercet.planning.packing import Packing

# The example of figure 1 of the ZeRO paper: 7.5e9 parameters, 64 workers. 75 layers of 1e8 parameters each.
PAPER = ModelFacts(
    num_parameters=7_500_000_000, num_embedding_parameters=0, num_layers=75, hidden_size=4096, max_seq_length=None
)
BERT = ModelFacts(
    num_parameters=110_000_000, num_embedding_parameters=24_000_000, num_layers=12, hidden_size=768, max_seq_length=512
)
BUCKET = 100_000_000  # bytes: 25e6 elements of fp32


def parts(memory: Memory) -> tuple[int, int, int, int]:
    return memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes, memory.host_bytes


def test_one_worker_holds_16_bytes_per_parameter() -> None:
    # The paper's 2 + 2 + 12 bytes (fp16 with fp32 copies) are 120 GB; fp32 alone has 4 + 4 + 8, the same sum.
    memory = memory_of(PAPER, "ddp", 1, Kept(0))
    assert parts(memory) == (30e9, 30e9, 60e9, 0)
    assert memory.total_bytes == 120e9


@pytest.mark.parametrize(
    ("parallelism", "of_the_paper", "weights", "gradients", "optimizer", "host"),
    [
        # Of the paper, with its 2, 2 and 12 bytes replaced by fp32's 4, 4 and 8; then what the libraries add.
        ("ddp", 120e9, 0, 0, 0, 0),
        # 30 + 30 + 60 / 64 GB; DeepSpeed's copy of the weights' shard, 30 / 64, and two buckets.
        ("zero1", 60e9 + 0.9375e9, 0.46875e9, 2 * BUCKET, 0, 0),
        # 30 + 90 / 64 GB; the same.
        ("zero2", 30e9 + 1.40625e9, 0.46875e9, 2 * BUCKET, 0, 0),
        # 120 / 64 GB (figure 1: 1.9 GB); one layer of 1e8 parameters with its gradient, gathered; one bucket.
        ("zero3", 1.875e9, 0.4e9, 0.4e9 + BUCKET, 0, 0),
        ("fsdp2", 1.875e9, 0.4e9, 0.4e9, 0, 0),
        # On the device that layer alone. In host memory 4 + 4 + 8 + 8 bytes: 180 / 64 GB.
        ("zero3_offload", 0, 0.4e9, 0.4e9 + BUCKET, 0, 2.8125e9),
    ],
)
def test_what_is_sharded(
    parallelism: Parallelism, of_the_paper: float, weights: float, gradients: float, optimizer: float, host: float
) -> None:
    memory = memory_of(PAPER, parallelism, 64, Kept(0))
    assert memory.total_bytes == of_the_paper + weights + gradients + optimizer
    assert memory.host_bytes == host


@pytest.mark.parametrize(
    ("parallelism", "expected"),
    [
        ("ddp", (30e9, 30e9, 60e9, 0)),
        ("zero1", (30.46875e9, 30.2e9, 0.9375e9, 0)),
        ("zero2", (30.46875e9, 0.66875e9, 0.9375e9, 0)),
        ("zero3", (0.86875e9, 0.96875e9, 0.9375e9, 0)),
        ("fsdp2", (0.86875e9, 0.86875e9, 0.9375e9, 0)),
        ("zero3_offload", (0.4e9, 0.5e9, 0, 2.8125e9)),
    ],
)
def test_every_part_of_the_memory(parallelism: Parallelism, expected: tuple[float, ...]) -> None:
    assert parts(memory_of(PAPER, parallelism, 64, Kept(0))) == expected


@pytest.mark.parametrize("facts", [PAPER, BERT], ids=["7.5e9", "BERT"])
@pytest.mark.parametrize("num_workers", [2, 3, 8, 64])
def test_each_stage_needs_no_more_than_the_one_before(facts: ModelFacts, num_workers: int) -> None:
    stages: tuple[Parallelism, ...] = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
    totals = [memory_of(facts, stage, num_workers, Kept(1000)).total_bytes for stage in stages]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("parallelism", get_args(Parallelism))
def test_more_workers_never_need_more_each(parallelism: Parallelism) -> None:
    totals = [memory_of(BERT, parallelism, num_workers, Kept(1000)).total_bytes for num_workers in (2, 4, 8, 100)]
    assert totals == sorted(totals, reverse=True)


def test_the_gathered_unit_may_be_the_embeddings() -> None:
    # 24e6 in the embeddings, 86e6 / 12 in a layer.
    assert memory_of(BERT, "fsdp2", 10, Kept(0)).weights_bytes == 44_000_000 + 96_000_000


def activations(precision: str = "fp32", checkpointing: bool = False) -> int:
    training = TrainingConfig.model_validate({"precision": precision, "gradient_checkpointing": checkpointing})
    return memory_of(BERT, "ddp", 1, Kept(1000), training).activations_bytes


def test_activations() -> None:
    # As counted, without attention: 51 bytes * 1000 tokens * 768 * 12 layers in 16 bits; 74 in 32 bits.
    assert activations("bf16") == activations("fp16") == 470_016_000
    assert activations("fp32") == activations("tf32") == 681_984_000


def test_gradient_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    # (4 bytes * 12 layers + 51 or 74) * 1000 tokens * 768.
    assert activations("bf16", checkpointing=True) == 76_032_000
    assert activations(checkpointing=True) == 93_696_000


def test_each_forward_pass_keeps_16_bit_copies_of_its_own() -> None:
    def weights(num_passes: int, **training: Any) -> int:
        config = TrainingConfig.model_validate({"precision": "bf16", **training})
        return memory_of(BERT, "ddp", 1, Kept(0, num_passes=num_passes), config).weights_bytes

    assert weights(4) - weights(1) == 3 * 2 * 86_000_000
    assert weights(4, gradient_checkpointing=True) == weights(1)  # freed at the end of each pass
    assert weights(4, precision="fp32") == weights(1, precision="fp32")


def test_attention_weights_and_dropout_masks() -> None:
    # 12 heads, 12 layers; with checkpointing one layer at a time.
    facts = dataclasses.replace(BERT, num_heads=12)
    whole = memory_of(facts, "ddp", 1, Kept(0, attention_bytes=1000))
    assert whole.activations_bytes == 1000 * 12 * 12
    one_layer = memory_of(facts, "ddp", 1, Kept(0, attention_bytes=1000), TrainingConfig(gradient_checkpointing=True))
    assert one_layer.activations_bytes == 1000 * 12


@pytest.mark.parametrize(
    ("packing", "use_gpu", "precision", "num_passes", "bytes_per_pair"),
    [
        ("packed", True, "bf16", 1, 4),
        ("packed", True, "fp32", 1, 8),
        ("packed", False, "fp32", 1, 8),
        ("chunked", False, "bf16", 4, 12),
        ("chunked", True, "bf16", 4, 0),  # torch's attention for padded texts keeps no weights on a GPU
        ("plain", True, "bf16", 3, 0),
    ],
)
def test_what_is_kept_for_a_backward_pass(
    packing: Packing, use_gpu: bool, precision: str, num_passes: int, bytes_per_pair: int
) -> None:
    recipe = config(
        training={"global_batch_size": 32, "precision": precision}, workers={"num_workers": 2, "use_gpu": use_gpu}
    )
    # Columns of 12, 22 and 12 tokens on average, and of 12, 102 and 22 at most: 16 rows on each worker.
    lengths = {"anchor": (40, 40), "positive": (80, 400), "negative": (40, 80)}
    texts = {name: TextStatistics(mean_chars=mean, max_chars=most) for name, (mean, most) in lengths.items()}
    kept = kept_for_backward(recipe, manifest().model_copy(update={"text_statistics": texts}), None, packing)
    assert kept.num_tokens == 16 * (12 + 22 + 12)
    assert kept.num_passes == num_passes
    # The mean square of a length is twice the squared mean, or the mean times the greatest length if that is less.
    assert kept.attention_bytes == bytes_per_pair * 16 * (12 * 12 + 22 * 44 + 12 * 22)


def test_a_gpu_holds_more_than_tensors() -> None:
    memory = memory_of(BERT, "ddp", 1, Kept(0, overhead_bytes=GPU_OVERHEAD_BYTES))
    assert memory.total_bytes == memory_of(BERT, "ddp", 1, Kept(0)).total_bytes + 3 * 2**29
    assert "CUDA 1.5 GiB" in memory.text()
    assert "CUDA" not in memory_of(BERT, "ddp", 1, Kept(0)).text()


@pytest.mark.parametrize("parallelism", get_args(Parallelism))
def test_autocast_keeps_16_bit_copies_of_whole_weights(parallelism: Parallelism) -> None:
    plain = memory_of(BERT, parallelism, 2, Kept(0))
    autocast = memory_of(BERT, parallelism, 2, Kept(0), TrainingConfig(precision="bf16"))
    copies = 2 * 86_000_000 if parallelism in ("ddp", "zero1", "zero2") else 0
    assert autocast.total_bytes - plain.total_bytes == copies


def test_copies_of_frozen_weights_are_freed_with_the_activations() -> None:
    def copies(checkpointing: bool, lora: LoraConfig | None) -> int:
        weights = [
            memory_of(
                BERT, "ddp", 2, Kept(0), TrainingConfig(precision=precision, gradient_checkpointing=checkpointing), lora
            ).weights_bytes
            for precision in ("fp32", "bf16")
        ]
        return weights[1] - weights[0]

    assert copies(True, None) == copies(False, None) == copies(False, LoraConfig()) == 2 * 86_000_000
    assert copies(True, LoraConfig()) == 2 * 7_166_667  # 86e6 / 12, rounded up


def test_an_adapter_of_every_linear_layer() -> None:
    # Rank 16, h 768: query, key, value and output 4 * 16 * (768 + 768), the feed-forward's two 2 * 16 * (768 + 3072).
    assert num_trainable_parameters(BERT, LoraConfig(rank=16)) == 12 * (98_304 + 122_880)


def test_an_adapter_of_named_layers() -> None:
    assert num_trainable_parameters(BERT, LoraConfig(rank=8, target_modules=("query", "value"))) == 12 * 2 * 8 * 1536


def test_frozen_weights_have_no_gradients_and_no_moments() -> None:
    lora = LoraConfig(rank=16)
    adapter = 2_654_208
    assert parts(memory_of(BERT, "ddp", 1, Kept(0), lora=lora)) == (
        4 * (110_000_000 + adapter),
        4 * adapter,
        8 * adapter,
        0,
    )
    zero2 = memory_of(BERT, "zero2", 2, Kept(0), lora=lora)
    assert zero2.weights_bytes == 4 * 110_000_000 + 4 * adapter + 2 * adapter
    assert zero2.gradients_bytes == 2 * adapter + 2 * BUCKET
    # Of the gathered unit, too, only the adapter has gradients.
    assert memory_of(BERT, "fsdp2", 2, Kept(0), lora=lora).gradients_bytes == 2 * adapter + 4 * adapter / 12
    assert memory_of(BERT, "zero3_offload", 2, Kept(0), lora=lora).host_bytes == 2 * 110_000_000 + 12 * adapter


@pytest.mark.parametrize(
    ("parallelism", "more"),
    [
        ("ddp", 0),
        ("zero1", 0),
        ("zero2", 440e6 - 220e6),  # whole instead of a half
        ("zero3", 440e6 - 96e6),  # whole instead of the gathered unit
        ("zero3_offload", 440e6 - 96e6),
        ("fsdp2", 0),
    ],
)
def test_gradients_accumulate_whole_under_a_cached_loss(parallelism: Parallelism, more: float) -> None:
    plain, cached = (memory_of(BERT, parallelism, 2, Kept(0), loss_is_cached=cached) for cached in (False, True))
    assert cached.gradients_bytes - plain.gradients_bytes == more


@pytest.mark.parametrize("parallelism", get_args(Parallelism))
def test_gradients_accumulate_whole_over_accumulation_steps(parallelism: Parallelism) -> None:
    plain, accumulated = (
        memory_of(BERT, parallelism, 2, Kept(0), TrainingConfig(gradient_accumulation_steps=n)) for n in (1, 4)
    )
    more = 440e6 - 96e6 if parallelism == "fsdp2" else 0
    assert accumulated.gradients_bytes - plain.gradients_bytes == more


def test_a_tenth_is_left_free() -> None:
    def memory(num_bytes: int) -> Memory:
        return Memory(
            weights_bytes=num_bytes, gradients_bytes=0, optimizer_bytes=0, activations_bytes=0, host_bytes=1000
        )

    on_gpu, on_cpu = WorkersConfig(use_gpu=True), WorkersConfig(use_gpu=False)
    assert fits(memory(900), on_gpu, 1000)
    assert not fits(memory(901), on_gpu, 1000)
    assert not fits(memory(0), on_cpu, 1000)  # its host memory is the same memory


def test_the_documentation_shows_what_the_code_prints() -> None:
    page = (REPOSITORY / "docs" / "parallelism.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)
    assert example is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example[1], "docs/parallelism.md", "exec"), {})
    assert printed.getvalue() == example[2]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 B"), (1023, "1023.0 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
