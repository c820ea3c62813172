"""Makes the recipe's loss by sentence-transformers, and computes it from embeddings."""

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
# Both classes are deprecated in sentence-transformers 6.2, whose documentation names these as equal.
_SYMMETRIC = {
    "MultipleNegativesSymmetricRankingLoss": losses.MultipleNegativesRankingLoss,
    "CachedMultipleNegativesSymmetricRankingLoss": losses.CachedMultipleNegativesRankingLoss,
}


def make_loss(config: LossConfig, model: SentenceTransformer, guide: SentenceTransformer | None = None) -> Any:
    """Return the recipe's loss around a model. If it needs a guide and none is given, the guide is loaded.

    Raises ConfigError when the loss cannot be used with this model."""
    arguments = config.model_dump(exclude={"name", "matryoshka", "guide", "guide_revision"})
    if "distance_metric" in arguments:
        arguments["distance_metric"] = _DISTANCES[arguments["distance_metric"]]
    if "similarity_fct" in arguments:
        arguments["similarity_fct"] = getattr(util, arguments["similarity_fct"])
    if "gather_across_devices" in arguments:
        # sentence-transformers 6.2 asks for its rank even if there is no process group to gather from.
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
            f"loss.name={config.name} cannot be used with this model: {error}", hint="choose another loss or model"
        ) from error
    return loss if config.matryoshka is None else _matryoshka(config.matryoshka, model, loss)


def load_guide(config: LossConfig, device: str = "cpu") -> SentenceTransformer | None:
    """Return the frozen guide of a GIST loss, or None for any other loss.

    The trainer moves it to the model's device, as a part of the loss. Raises ConfigError when it cannot be loaded."""
    if not isinstance(config, GuidedLossConfig):
        return None
    try:
        guide = load_model(ModelConfig(name_or_path=config.guide, revision=config.guide_revision), device=device)
    except ConfigError as error:
        message = error.message.replace("model.name_or_path", "loss.guide")
        # Hints about model.trust_remote_code or model.config_kwargs do not apply to a guide.
        raise ConfigError(message, "choose another guide" if "model." in error.hint else error.hint) from error
    # The trainer optimizes all weights of the loss that require gradients.
    return guide.requires_grad_(False).eval()


def _matryoshka(config: MatryoshkaConfig, model: SentenceTransformer, loss: Any) -> Any:
    width = model.get_embedding_dimension()
    too_wide = [dim for dim in config.dims if width is not None and dim > width]
    if too_wide:
        raise ConfigError(
            f"loss.matryoshka.dims: {', '.join(map(str, too_wide))} is wider than the model's embeddings, "
            f"which have {width} components",
            hint=f"choose widths of at most {width}",
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
    """Compute a loss without gradient caching from the embeddings of a batch.

    columns: the features of each column, which some losses read too. embeddings: one tensor per column, shape
    (num_rows, width). Returns what the loss returns."""
    with _given_embeddings(loss):
        return loss(
            [{**features, "sentence_embedding": own} for features, own in zip(columns, embeddings, strict=True)], labels
        )


def loss_value(loss: Any, embeddings: Sequence[torch.Tensor]) -> float:
    """Compute a loss that reads embeddings only, with or without gradient caching; no gradients.

    embeddings: one tensor per column, shape (num_rows, width)."""
    with torch.no_grad():
        if uses_gradient_cache(loss):
            caching = loss.loss if isinstance(loss, MatryoshkaLoss) else loss
            return float(caching.calculate_loss([[own] for own in embeddings]))
        return float(loss_of(loss, [{} for _ in embeddings], embeddings))


@contextmanager
def not_gathering(loss: Any) -> Iterator[None]:
    """Inside the block, the loss does not gather the embeddings of other ranks."""
    holders, holder = [], loss
    while holder is not None:  # a loss may hold another one
        holders += [holder] if "gather_across_devices" in vars(holder) else []
        holder = vars(holder).get("loss") or getattr(holder, "_modules", {}).get("loss")
    with _replaced(holders, "gather_across_devices", False):
        yield


@contextmanager
def _replaced(holders: Sequence[Any], name: str, value: Any) -> Iterator[None]:
    """Inside the block, an attribute of all holders has this value."""
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, value)
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            setattr(holder, name, own)


class _Given(torch.nn.Module):  # type: ignore[misc]
    """Stands in for a model: returns the embeddings that the features already contain."""

    def forward(self, features: Features) -> Features:
        return {"sentence_embedding": features["sentence_embedding"]}


@contextmanager
def _given_embeddings(loss: Any) -> Iterator[None]:
    """Inside the block, the loss gets the given embeddings when it calls its model.

    MatryoshkaLoss holds the model as well as the inner loss, so both are replaced."""
    holders: list[Any] = [holder for holder in (loss, getattr(loss, "loss", None)) if hasattr(holder, "model")]
    with _replaced(holders, "model", _Given()):
        yield
