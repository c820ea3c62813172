"""The meter counts tokens, operations and time without asking the device."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

from support import tiny_model
from tercet.config.sections import ModelConfig
from tercet.model.encoder import make_model
from tercet.model.packed_model import prepare
from tercet.training.meter import Arithmetic, Meter, arithmetic_of
from tercet.training.peak import MEASURED, Peak, listed_peak, peak_of

CPU = torch.device("cpu")
SMALL = Arithmetic(num_weights=10, num_trained_weights=10, attention_width=4, windows=(None, None))


def meter(arithmetic: Arithmetic = SMALL) -> Meter:
    return Meter(arithmetic, Peak(1000.0, "the peak of a test"), CPU)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model.tiny_bert(tmp_path_factory.mktemp("model") / "model", tiny_model.all_texts())
    return make_model(ModelConfig(name_or_path=str(folder)), "cpu", None)


def test_the_times_of_all_phases_add_up() -> None:
    measured, started = meter(), time.monotonic()
    measured.start()
    measured.add([])
    with measured.phase("data"):
        time.sleep(0.02)
    with measured.phase("evaluation"):
        time.sleep(0.02)
        with measured.phase("ranks"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="broken"), measured.phase("storage"):
        raise ValueError("broken")
    reading, wall = measured.reading(), time.monotonic() - started
    assert sum(reading.seconds.values()) == pytest.approx(wall, abs=5e-3)
    assert set(reading.seconds) == {"start", "compute", "data", "evaluation", "ranks", "storage"}
    assert min(reading.seconds[phase] for phase in ("data", "evaluation", "ranks")) >= 0.02
    assert reading.seconds["evaluation"] < 0.04  # the wait within it is shown apart


@pytest.mark.parametrize("layout", ["padded", "row", "ahead"])
def test_tokens_of_texts_and_padding_are_counted_apart(layout: str) -> None:
    """Two rows of two columns: 3 + 5 and 2 + 2 tokens."""
    batches: dict[str, dict[str, Any]] = {
        "padded": {
            "anchor_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
            "anchor_input_ids": torch.zeros(2, 5, dtype=torch.long),
            "positive_attention_mask": torch.ones(2, 2, dtype=torch.long),
            "positive_input_ids": torch.zeros(2, 2, dtype=torch.long),
        },
        "ahead": {"batch": SimpleNamespace(lengths=[2, 2, 3, 5], num_texts=[2, 2])},
        "row": {
            "anchor_cu_seq_lens_q": torch.tensor([0, 3, 8], dtype=torch.int32),
            "anchor_input_ids": torch.zeros(1, 8, dtype=torch.long),
            "positive_cu_seq_lens_q": torch.tensor([0, 2, 4], dtype=torch.int32),
            "positive_input_ids": torch.zeros(1, 4, dtype=torch.long),
        },
    }
    measured = meter()
    measured.add(measured.sizes([batches[layout], batches[layout]]))  # two batches a step
    measured.close_step()
    reading = measured.reading()
    assert (reading.num_steps, reading.num_rows, reading.num_tokens) == (1, 4, 24)
    num_pairs = 2 * 2 * (9 + 25 + 4 + 4)  # layers, batches
    assert reading.flops == 6 * 10 * 24 + 12 * 4 * num_pairs


def test_windows_and_causal_attention_have_fewer_pairs() -> None:
    lengths = np.array([4, 100])
    full = Arithmetic(1, 1, 1, (None,)).num_pairs(lengths)
    assert full == 16 + 10_000
    assert Arithmetic(1, 1, 1, (None, 10)).num_pairs(lengths) == full + 16 + 1_000
    assert Arithmetic(1, 1, 1, (None,), is_causal=True).num_pairs(lengths) == full // 2


def test_operations_are_those_that_torch_counts(model: Any) -> None:
    """Matrices and attention of one step, forward and backward; the gradient of the first layer's input goes on to
    the embeddings."""
    forward = prepare(model, "plain")
    features = model.tokenize(["ba be bi", "do du da", "fo fu fa"])
    lengths = features["attention_mask"].sum(dim=1)
    assert forward.packing == "plain"
    model.train()
    model[0].model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        model(features)["sentence_embedding"].sum().backward()
    arithmetic = arithmetic_of(model, is_cached=False)
    expected = arithmetic.flops(int(lengths.sum()), arithmetic.num_pairs(lengths.numpy()))
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_what_is_frozen_needs_no_gradient_and_a_cached_loss_a_second_pass(model: Any) -> None:
    whole = arithmetic_of(model, is_cached=False)
    assert whole.num_weights == whole.num_trained_weights > 0
    assert arithmetic_of(model, is_cached=True).flops(100, 0) == pytest.approx(whole.flops(100, 0) * 8 / 6)
    for weight in model[0].model.encoder.parameters():
        weight.requires_grad_(False)
    try:
        assert arithmetic_of(model, is_cached=False).flops(100, 0) == pytest.approx(
            whole.flops(100, 0) * 4 / 6, rel=0.01
        )
    finally:
        for weight in model[0].model.encoder.parameters():
            weight.requires_grad_(True)


def test_positions_are_those_of_the_forward_pass_in_training(model: Any) -> None:
    measured = meter()
    measured.count_positions(model)
    features = model.tokenize(["ba be bi", "do"])
    model.train()
    model(dict(features))
    model.eval()
    model(dict(features))  # an evaluation does not count
    assert measured.reading().num_padding_tokens == features["input_ids"].numel()


def test_a_line_is_what_happened_since_the_line_before() -> None:
    measured = meter()
    for num_tokens in (3, 5):
        measured.add(measured.sizes([{"anchor_cu_seq_lens_q": torch.tensor([0, num_tokens])}]))
        measured.close_step()
        line = measured.close_line(lambda own: [own, own])
        assert (line.num_steps, line.num_rows, line.num_tokens) == (1, 2, 2 * num_tokens)
        assert measured.own_line.num_tokens == num_tokens
    assert measured.reading().num_tokens == 8


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "tf32", 378),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("a card of tomorrow", "bf16", None),
    ],
)
def test_peaks_of_gpus(name: str, precision: str, tera: float | None) -> None:
    peak = listed_peak(name, precision)
    assert (None if peak is None else peak.flops_per_second) == (None if tera is None else tera * 1e12)


def test_elsewhere_the_peak_is_measured_and_says_so() -> None:
    state = torch.random.get_rng_state()
    peak = peak_of(CPU, "fp32")
    assert peak.source == f"{MEASURED} in fp32"
    assert 1e8 < peak.flops_per_second < 1e15
    assert torch.equal(torch.random.get_rng_state(), state)  # the training draws the same numbers


def test_a_row_of_texts_has_no_padding(tmp_path: Path) -> None:
    folder = tiny_model.tiny_bert(tmp_path / "model", tiny_model.all_texts())
    packed = SentenceTransformer(str(folder), device="cpu")
    forward = prepare(packed, "packed")
    measured = meter(arithmetic_of(packed, is_cached=False))
    measured.count_positions(packed)
    batch = forward.batch([packed.preprocess(["ba be bi", "do"])])
    packed.train()
    batch.embed(packed)  # such as the trial of the longest batch: not a step
    measured.add(measured.sizes([{"batch": batch}]))
    batch.embed(packed)
    assert measured.reading().num_padding_tokens == 0
    assert measured.reading().num_tokens == sum(batch.lengths)
