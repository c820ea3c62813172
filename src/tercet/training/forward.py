"""How the texts of a batch share a forward pass, chosen once per run: packing, and the attention kernel."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer

from tercet.model.collectives import gather_objects, run_on_rank_0
from tercet.model.packed_model import Forward, facts_of, fused_kernel_obstacle, kernel_obstacle, prepare
from tercet.model.packing_trial import choose_packing
from tercet.model.precision import activations_dtype
from tercet.planning.packing import Attention, ForwardChoice, Packing, needs_trial, stored_choice, without_rows
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage, layout
from tercet.training.choices import choose_once


def resolve_forward(
    plan: TrainPlan,
    storage: Storage,
    model: SentenceTransformer,
    guide: SentenceTransformer | None,
    device: torch.device,
) -> Forward:
    """Prepare the model's forward pass as the run chose it when it began. Every rank must call it.

    Rank 0 runs the trial. A way that the recipe names, and that needs no trial, is taken from there instead. Raises
    PlanError where the recipe wants rows and the trial refuses them, or where this machine cannot do what was chosen,
    and CorruptObject where the stored choice is damaged: on all ranks alike."""
    wanted, is_cached = plan.config.workers.packing, plan.config.loss.is_cached
    if not needs_trial(wanted):
        packing, reason = without_rows(wanted, facts_of(model, is_cached))
        return prepare(model, packing, is_cached, reason=reason)

    def decide() -> tuple[Packing, str]:
        stored = stored_choice(storage, plan.run_id)
        if stored is not None and stored.is_untried:
            return stored.packing, stored.reason
        # What the recipe wants is an error only where nothing has been chosen yet.
        return choose_packing(model, wanted if stored is None else "auto", is_cached, guide)

    packing, reason = run_on_rank_0(decide)
    obstacles: dict[Attention, str | None] = dict.fromkeys(("fused", "bounds"), "the forward pass is not packed")
    if packing == "packed":
        dtype = activations_dtype(plan.config.training.computed_precision)
        models = [each for each in (model, guide) if each is not None]
        obstacles = {
            "fused": _first_of_all_ranks([fused_kernel_obstacle(each, device, dtype) for each in models]),
            "bounds": _first_of_all_ranks([kernel_obstacle(each, device, dtype) for each in models]),
        }

    def obstacle(choice: ForwardChoice) -> str | None:
        possible, why = packing, reason
        if choice.packing != "packed":
            possible, why = without_rows(choice.packing, facts_of(model, is_cached))
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
    return prepare(model, choice.packing, is_cached, guide, choice.attention, choice.reason)


def _first_of_all_ranks(obstacles: list[str | None]) -> str | None:
    return next((why for of_rank in gather_objects(obstacles) for why in of_rank if why), None)


def _attention(obstacles: dict[Attention, str | None]) -> Attention:
    return next((each for each, why in obstacles.items() if why is None), "matrices")
