"""A training step reads no value back from the device, and runs few kernels.

The step is that of the trainer: forward, pooling, loss, backward, norms, clipping, guard and optimizer, packed, in 16
bits under autocast, with attention by torch's flash kernel. It runs on the `meta` device, where tensors have no values:
`item`, `tolist`, `nonzero` and a tensor in an `if` raise an error there."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sentence_transformers import SentenceTransformer

from support.meta_step import META, CudaAutocast, KernelCount
from support.tiny_families import FAMILIES, FURTHER, tiny_encoder
from support.tiny_model import all_texts
from tercet.config.losses import LossConfig
from tercet.model import weight_casts
from tercet.model.loss import make_loss
from tercet.model.packed_model import Forward, prepare
from tercet.model.weight_casts import cast_by_layer
from tercet.training.guards import NonFiniteGuard
from tercet.training.trainer import TercetTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES: dict[str, dict[str, Any]] = {
    "MultipleNegativesRankingLoss": {},
    "TripletLoss": {"distance_metric": "cosine", "triplet_margin": 0.5},
}
ALL_FAMILIES = tuple(family for family in (*FAMILIES, *FURTHER) if family != "mpnet")  # its bias needs matrices

# Kernels of a layer of BERT in a forward and backward pass: 12 changes of type (34 where autocast casts each weight by
# itself), 18 products of matrices, 2 for attention, 22 others (docs/log.md). The optimizer, clipping and norms have few
# for all layers together.
KERNELS_A_LAYER = 54
KERNELS_BY_AUTOCAST = 76


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a packed model of a family on the meta device, in training mode, and a batch for it."""

    @cache
    def folder(family: str, pooling: str) -> Path:
        return tiny_encoder(tmp_path_factory.mktemp("family"), family, all_texts(), pooling, dropout=0.1)

    def make(family: str, pooling: str = "mean", num_layers: int = 3) -> tuple[SentenceTransformer, Forward, Any]:
        options: dict[str, Any] = {"config_kwargs": {"num_hidden_layers": num_layers}} if family == "bert" else {}
        model = SentenceTransformer(str(folder(family, pooling)), device="cpu", **options).train()
        forward = prepare(model, "packed", attention="fused")
        draw = random.Random(7)
        texts = [[" ".join(draw.choices(all_texts(), k=draw.randint(1, 30))) for _ in range(6)] for _ in range(3)]
        batch = forward.batch([model.preprocess(column) for column in texts])
        return model.to(META), forward, batch.to(META)

    return make


def steps(model: SentenceTransformer, forward: Forward, batch: Any, loss: str) -> Counter[str]:
    """Run two steps as TercetTrainer does with DDP. Return the kernels of the last forward and backward pass."""
    section: Any = TypeAdapter(LossConfig).validate_python({"name": loss, **LOSSES[loss]})
    guard = NonFiniteGuard(META)
    trainer: Any = SimpleNamespace(
        _forward=forward,
        _micro_batch=None,
        loss=make_loss(section, model, None),
        model=model,
        _parallelism="ddp",
        _finite=guard,
        accelerator=SimpleNamespace(unscale_gradients=lambda: None),
        args=SimpleNamespace(max_grad_norm=1.0),
    )
    trainer._embed = MethodType(TercetTrainer._embed, trainer)
    adam = torch.optim.AdamW(model.parameters(), foreach=True)  # torch's fused one knows no meta device
    for step in (1, 2):
        with KernelCount() as count:
            with CudaAutocast():
                value = TercetTrainer.compute_loss(trainer, model, {"batch": batch, "label": None})
            value.backward()
        guard.add_loss(value.detach())
        norm = TercetTrainer._clip_grad_norm(trainer, model)
        guard.close_step(step, norm)
        adam.step()
        adam.zero_grad()
    return count.counts


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_step_reads_nothing_back(load: Any, family: str) -> None:
    counts = steps(*load(family), "MultipleNegativesRankingLoss")
    assert counts["_flash_attention_forward"] == counts["_flash_attention_backward"] == 3


@pytest.mark.parametrize("pooling", ["cls", "lasttoken", "max", "mean_sqrt_len_tokens"])
def test_a_step_with_any_pooling_reads_nothing_back(load: Any, pooling: str) -> None:
    steps(*load("bert", pooling), "TripletLoss")


@pytest.mark.parametrize("reads", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x.any())])
def test_what_reads_raises_here(load: Any, reads: Any) -> None:
    model, forward, batch = load("bert")
    model[0].register_forward_hook(lambda _, __, features: reads(features["token_embeddings"]))
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps(model, forward, batch, "TripletLoss")


@pytest.mark.parametrize("by_layer", [True, False])
def test_kernels_of_a_layer(load: Any, by_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded bound: lower it with what lowers the number."""
    monkeypatch.setattr(weight_casts, "autocast_dtype", lambda _: torch.bfloat16)
    fewer, more = (load("bert", "mean", num_layers) for num_layers in (2, 3))
    for model, *_ in (fewer, more):
        if by_layer:
            cast_by_layer(model)
    counts = steps(*more, "TripletLoss") - steps(*fewer, "TripletLoss")
    assert counts["_flash_attention_forward"] == counts["_flash_attention_backward"] == 1
    assert sum(counts.values()) == (KERNELS_A_LAYER if by_layer else KERNELS_BY_AUTOCAST), counts
