"""The loss named in a recipe, as sentence-transformers makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, TripletDistanceMetric

from tercet.config.losses import GuidedLossConfig, LossConfig, MatryoshkaConfig
from tercet.config.sections import ModelConfig
from tercet.errors import ConfigError
from tercet.model.encoder import load_model

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


Features = dict[str, Any]


def loss_of(
    loss: Any, columns: Sequence[Features], embeddings: Sequence[torch.Tensor], labels: torch.Tensor | None = None
) -> Any:
    """What a loss without gradient caching says of a batch. columns: the features of each column, for what else the
    loss looks at. embeddings: of each column, shape (num_rows, width)."""
    with _given_embeddings(loss):
        return loss(
            [{**features, "sentence_embedding": own} for features, own in zip(columns, embeddings, strict=True)], labels
        )


def loss_value(loss: Any, embeddings: Sequence[torch.Tensor]) -> float:
    """What a loss that looks at embeddings only says of a batch, with gradient caching or without."""
    with torch.no_grad():
        if uses_gradient_cache(loss):
            caching = loss.loss if isinstance(loss, MatryoshkaLoss) else loss
            return float(caching.calculate_loss([[own] for own in embeddings]))
        return float(loss_of(loss, [{} for _ in embeddings], embeddings))


class _Given(torch.nn.Module):  # type: ignore[misc]
    """Hands out embeddings that are among the features already."""

    def forward(self, features: Features) -> Features:
        return {"sentence_embedding": features["sentence_embedding"]}


@contextmanager
def _given_embeddings(loss: Any) -> Iterator[None]:
    """Inside, the loss finds the embeddings where it would call the model. MatryoshkaLoss holds the model, too, beside
    the loss that it holds."""
    holders: list[Any] = [holder for holder in (loss, getattr(loss, "loss", None)) if hasattr(holder, "model")]
    models, given = [holder.model for holder in holders], _Given()
    try:
        for holder in holders:
            holder.model = given
        yield
    finally:
        for holder, model in zip(holders, models, strict=True):
            holder.model = model
