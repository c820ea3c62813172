"""The loss named in a recipe, as sentence-transformers makes it."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric

from tercet.encoder import load_model
from tercet.errors import ConfigError
from tercet.loss_config import GuidedLossConfig, LossConfig, MatryoshkaConfig
from tercet.sections import ModelConfig

_DISTANCES = {
    "euclidean": TripletDistanceMetric.EUCLIDEAN,
    "cosine": TripletDistanceMetric.COSINE,
    "manhattan": TripletDistanceMetric.MANHATTAN,
}
# Both classes are deprecated in sentence-transformers 6.2, and will be removed; these are the same by its own word.
_SYMMETRIC = {
    "MultipleNegativesSymmetricRankingLoss": losses.MultipleNegativesRankingLoss,
    "CachedMultipleNegativesSymmetricRankingLoss": losses.CachedMultipleNegativesRankingLoss,
}


def make_loss(config: LossConfig, model: SentenceTransformer, guide: SentenceTransformer | None = None) -> Any:
    """The loss named in the recipe, around the model. A guide that it needs and is not given is loaded.

    Raises ConfigError when the loss does not go with this model."""
    arguments = config.model_dump(exclude={"name", "matryoshka", "guide", "guide_revision"})
    if "distance_metric" in arguments:
        arguments["distance_metric"] = _DISTANCES[arguments["distance_metric"]]
    if "similarity_fct" in arguments:
        arguments["similarity_fct"] = getattr(util, arguments["similarity_fct"])
    if "gather_across_devices" in arguments:
        # sentence-transformers 6.2 asks for the rank of a process group even where there is none to gather from.
        arguments["gather_across_devices"] = config.crosses_ranks and torch.distributed.is_initialized()
    if config.name in _SYMMETRIC:
        arguments |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if isinstance(config, GuidedLossConfig):
        arguments["guide"] = guide if guide is not None else load_guide(config, device=str(model.device))
    loss_class = _SYMMETRIC.get(config.name) or getattr(losses, config.name)
    try:
        loss = loss_class(model, **arguments)
    except ValueError as error:
        raise ConfigError(
            f"loss.name={config.name} does not go with this model: {error}", hint="choose another loss or model"
        ) from error
    return loss if config.matryoshka is None else _matryoshka(config.matryoshka, model, loss)


def load_guide(config: LossConfig, device: str = "cpu") -> SentenceTransformer | None:
    """The guide of a GIST loss, frozen, or None for a loss that has none. The trainer moves it to the model's device,
    as a part of the loss.

    Raises ConfigError when it cannot be loaded."""
    if not isinstance(config, GuidedLossConfig):
        return None
    try:
        guide = load_model(ModelConfig(name_or_path=config.guide, revision=config.guide_revision), device=device)
    except ConfigError as error:
        message = error.message.replace("model.name_or_path", "loss.guide")
        # What it advises for the model (model.trust_remote_code, model.config_kwargs) a guide does not have.
        raise ConfigError(message, "choose another guide" if "model." in error.hint else error.hint) from error
    # The trainer gives all weights of a loss that ask for gradients to the optimizer.
    return guide.requires_grad_(False).eval()


def _matryoshka(config: MatryoshkaConfig, model: SentenceTransformer, loss: Any) -> Any:
    width = model.get_embedding_dimension()
    too_wide = [dim for dim in config.dims if width is not None and dim > width]
    if too_wide:
        raise ConfigError(
            f"loss.matryoshka.dims: {', '.join(map(str, too_wide))} is wider than the model's embeddings, "
            f"which have {width} components",
            hint=f"no more than {width}",
        )
    return losses.MatryoshkaLoss(
        model,
        loss,
        matryoshka_dims=config.dims,
        matryoshka_weights=config.weights,
        n_dims_per_step=config.dims_per_step or -1,
    )
