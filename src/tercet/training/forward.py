"""How the texts of a batch share a forward pass, chosen once per run: packing, and the attention kernel."""

from __future__ import annotations

import logging

import torch
from sentence_transformers import SentenceTransformer

from tercet.model.collectives import gather_objects, run_on_rank_0
from tercet.model.packed_model import Forward, choose_packing, fused_kernel_obstacle, kernel_obstacle, prepare
from tercet.planning.packing import Attention, Packing
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.storage.documents import Document
from tercet.training.choices import choose_once

logger = logging.getLogger("tercet")

_ACTIVATIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ForwardChoice(Document):
    """What a run chose when it began, and why."""

    packing: Packing
    reason: str
    attention: Attention
    """The kernel for rows of texts."""


def resolve_forward(
    plan: TrainPlan,
    storage: Storage,
    model: SentenceTransformer,
    guide: SentenceTransformer | None,
    device: torch.device,
) -> Forward:
    """Prepare the model's forward pass as the run chose it when it began. Every rank must call it.

    A packing that the recipe names, and that needs no trial, is taken from there instead. Raises PlanError where this
    machine cannot do what was chosen, CorruptObject where the stored choice is damaged: on all ranks alike."""
    wanted, is_cached = plan.config.workers.packing, plan.config.loss.is_cached
    if wanted in ("plain", "chunked"):
        return prepare(model, wanted, is_cached, guide)
    packing, reason = choose_packing(model, wanted, is_cached, guide)
    obstacles: dict[Attention, str | None] = dict.fromkeys(("fused", "bounds"), "the forward pass is not packed")
    if packing == "packed":
        dtype = _ACTIVATIONS.get(plan.config.training.precision, torch.float32)
        models = [each for each in (model, guide) if each is not None]
        obstacles = {
            "fused": _first_of_all_ranks([fused_kernel_obstacle(each, device, dtype) for each in models]),
            "bounds": _first_of_all_ranks([kernel_obstacle(each, device, dtype) for each in models]),
        }

    def obstacle(choice: ForwardChoice) -> str | None:
        possible, why = choose_packing(model, choice.packing, is_cached, guide)
        if possible != choice.packing:
            return f"its forward pass is {choice.packing}, which is not possible here ({why})"
        why_not = obstacles.get(choice.attention)
        if why_not is not None:
            return f"it uses torch's attention kernel for rows of texts, which is not possible here ({why_not})"
        return None

    def make() -> ForwardChoice:
        return ForwardChoice(packing=packing, reason=reason, attention=_attention(obstacles))

    choice: ForwardChoice = run_on_rank_0(
        lambda: choose_once(storage, layout.forward_key(plan.run_id), ForwardChoice, make, obstacle)
    )
    forward = prepare(model, choice.packing, is_cached, guide, attention=choice.attention)
    return forward._replace(reason=choice.reason)


def _first_of_all_ranks(obstacles: list[str | None]) -> str | None:
    return next((why for of_rank in gather_objects(obstacles) for why in of_rank if why), None)


def _attention(obstacles: dict[Attention, str | None]) -> Attention:
    return next((each for each, why in obstacles.items() if why is None), "matrices")
