"""Makes one row of the texts of a batch, runs a model on it, and makes padded chunks for models that take no rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad

from tercet.model.grouped_attention import Layout
from tercet.model.loss import Features
from tercet.model.text_groups import chunks


def one_row(columns: list[Features], drops_prompts: bool) -> Features:
    """Concatenate the texts of all columns into the features of one row.

    Each column has `input_ids` of shape (1, num_tokens) and `cu_seq_lens_q` of shape (num_texts + 1,), and so has the
    result. drops_prompts: add the length of each text's prompt, which the pooling leaves out."""
    counts = [len(features["cu_seq_lens_q"]) - 1 for features in columns]
    bounds = torch.cat([features["cu_seq_lens_q"].diff() for features in columns]).cumsum(0)
    bounds = pad(bounds, (1, 0)).to(torch.int32)
    row: Features = {
        "input_ids": torch.cat([features["input_ids"] for features in columns], dim=1),
        "cu_seq_lens_q": bounds,
        "modality": columns[0]["modality"],
    }
    prompts = [int(features.get("prompt_length", 0)) for features in columns]
    if drops_prompts and any(prompts):  # Pooling supports one length for all texts
        row["prompt_lengths"] = [length for length, count in zip(prompts, counts, strict=True) for _ in range(count)]
    return row


def forward_row(self: Any, features: Features, **kwargs: Any) -> Features:
    """Extends `Transformer.forward`: sorts the texts of a row by length, and restores their order in the results."""
    forward = type(self).forward
    if "cu_seq_lens_q" not in features:
        padded: Features = forward(self, features, **kwargs)
        return padded
    bounds: list[int] = features["cu_seq_lens_q"].tolist()
    device = features["input_ids"].device
    order = sorted(range(len(bounds) - 1), key=lambda text: bounds[text + 1] - bounds[text])
    lengths = [bounds[text + 1] - bounds[text] for text in order]
    place = torch.cat([torch.arange(bounds[text], bounds[text + 1]) for text in order]).to(device)
    layout, offset = (
        Layout([length for length in lengths if length], device, self.by_bounds),
        self._flatten_position_offset,
    )
    row = {
        "input_ids": features["input_ids"][:, place],
        # Not those of the features: a guide may count positions from another number than the model does.
        "position_ids": (torch.cat([torch.arange(length) for length in lengths]) + offset)[None].to(device),
        "layout": layout,
        "modality": features["modality"],
    }
    back = torch.empty_like(place)
    back[place] = torch.arange(len(place), device=device)
    result = {key: value for key, value in features.items() if key != "prompt_lengths"}
    if "prompt_lengths" in features:
        back, result["cu_seq_lens_q"] = _without_prompts(back, bounds, features["prompt_lengths"])
    result["token_embeddings"] = forward(self, row, **kwargs)["token_embeddings"].index_select(1, back)
    return result


def _without_prompts(place: torch.Tensor, bounds: list[int], prompts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the tokens to pool, and the bounds of each text without its prompt.

    A text that is all prompt, because it was truncated, stays whole."""
    texts = zip(pairwise(bounds), prompts, strict=True)
    starts = [start + (prompt if stop - start > prompt else 0) for (start, stop), prompt in texts]
    kept = torch.cat([place[start:stop] for start, stop in zip(starts, bounds[1:], strict=True)])
    lengths = torch.tensor([0, *(stop - start for start, stop in zip(starts, bounds[1:], strict=True))])
    return kept, lengths.cumsum(0).to(place.device, torch.int32)


def padded_chunks(columns: list[Features]) -> tuple[list[Features], torch.Tensor]:
    """Return the texts of all columns in chunks, shortest first, each as wide as its longest text; and their order.

    The order has shape (num_texts,): the index of each text in the columns one after the other."""
    widest = max(features["input_ids"].shape[1] for features in columns)
    names = [name for name, value in columns[0].items() if isinstance(value, torch.Tensor) and value.ndim == 2]
    merged = {
        name: torch.cat([pad(features[name], (0, widest - features[name].shape[1])) for features in columns])
        for name in names
    }
    lengths, order = merged["attention_mask"].sum(dim=1).sort(stable=True)
    parts = []
    for start, stop, width in chunks(lengths.tolist()):
        rows = order[start:stop]
        part: Features = {name: value[rows, :width] for name, value in merged.items()}
        parts.append({**part, "modality": columns[0].get("modality", "text")})
    return parts, order
