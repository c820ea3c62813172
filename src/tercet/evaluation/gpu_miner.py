"""A model as the miner of sentence-transformers uses it, on a GPU: packed, in the recipe's precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from tercet.config.recipe import Config
from tercet.evaluation.encodings import encode_texts
from tercet.model.packing_trial import prepare_to_encode
from tercet.model.precision import computing_exactly, default_precision


def mining_precision(config: Config, device: torch.device) -> str:
    """Return the precision in which a model mines: on a GPU the recipe's, or else the GPU's default; on a CPU fp32."""
    named = config.training.precision
    if device.type == "cpu":
        return "fp32"
    return default_precision(str(device)) if named in (None, "auto") else named


class GpuMiner:
    """What `mine_hard_negatives` of sentence-transformers 6.2 asks of a model.

    It encodes by tokens, and compares embeddings on the GPU. The model alone would compare them on the CPU."""

    def __init__(self, model: Any, config: Config, precision: str) -> None:
        prepare_to_encode(model, config.workers.packing)
        self._model, self._batch_size, self._precision = model, config.evaluation.batch_size, precision
        self.device, self.similarity_pairwise = model.device, model.similarity_pairwise

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        """Return normalized embeddings as a NumPy array of shape (len(texts), width). The prompt is the model's own."""
        return self._encode(texts, "query")

    def encode_document(self, texts: list[str], **_: Any) -> Any:
        """Return normalized embeddings as a NumPy array of shape (len(texts), width). The prompt is the model's own."""
        return self._encode(texts, "document")

    def similarity(self, queries: Any, texts: Any) -> torch.Tensor:
        """Return the similarity of all pairs, computed in fp32 on the GPU: shape (num_queries, num_texts)."""
        with computing_exactly(self.device):
            pair = (torch.as_tensor(embeddings, device=self.device) for embeddings in (queries, texts))
            scores: torch.Tensor = self._model.similarity(*pair)
        return scores

    def _encode(self, texts: list[str], role: str) -> Any:
        embeddings = encode_texts(self._model, list(texts), role, self._batch_size, self._precision)
        return normalize(embeddings).cpu().numpy()
