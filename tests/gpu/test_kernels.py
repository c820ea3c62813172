"""Attention kernels and packed families on a CUDA device, beside the padded model; NCCL with a group of one.

TERCET_GPU_TESTS_ON_CPU=1 runs them on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from support.tiny_families import FAMILIES, FURTHER, tiny_encoder
from support.tiny_model import all_texts, triplets
from tercet.config.losses import MultipleNegativesRankingLossConfig
from tercet.model.collectives import gather_objects, run_on_rank_0
from tercet.model.loss import loss_of, make_loss
from tercet.model.packed_model import prepare

ON_CPU = os.environ.get("TERCET_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_CPU and not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"
    ),
]


def gradients(model: SentenceTransformer, packed: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss over a few rows, and the loss itself."""
    model.train()
    model.zero_grad()
    loss = make_loss(MultipleNegativesRankingLossConfig(name="MultipleNegativesRankingLoss"), model)
    rows = triplets(12)
    columns = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        if packed:
            forward = prepare(model, "packed")
            features = [model.preprocess(texts) for texts in columns]
            value = loss_of(loss, features, forward.batch(features).to(DEVICE).embed(model), None)
        else:
            features = [
                {
                    name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x
                    for name, x in model.preprocess(texts).items()
                }
                for texts in columns
            ]
            value = loss(features, None)
    value.backward()
    named = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {**named, "the loss": value.detach().float().cpu()}


@pytest.mark.parametrize("fused", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_a_packed_model_has_the_gradients_of_the_padded_one(
    family: str, dtype: torch.dtype, fused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_FUSED_ATTENTION", fused)
    folder = str(tiny_encoder(tmp_path / family, family, all_texts()))
    padded, packed = (gradients(SentenceTransformer(folder, device=str(DEVICE)), way, dtype) for way in (False, True))
    assert padded.keys() == packed.keys()
    ways = [torch.cat([way[name].flatten() for name in padded]) for way in (padded, packed)]
    # 8 bits: with random weights the two differ by some per cent. Texts that mix give 1 or more.
    assert float((ways[0] - ways[1]).norm() / ways[0].norm()) < (1e-4 if dtype == torch.float32 else 0.2)


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group with the backends of a training on GPUs."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    backend = "gloo" if ON_CPU else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_collectives_work_with_a_group_of_one() -> None:
    assert gather_objects({"rank": 0}) == [{"rank": 0}]
    assert run_on_rank_0(lambda: [1, 2]) == [1, 2]
    total = torch.ones(3, device=DEVICE)
    torch.distributed.all_reduce(total)
    assert total.tolist() == [1, 1, 1]
    module = torch.nn.Linear(4, 4).to(DEVICE)
    wrapped = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    wrapped(torch.ones(2, 4, device=DEVICE)).sum().backward()
    assert module.weight.grad is not None
