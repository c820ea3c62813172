"""Makes one row of the texts of a batch, and runs a model on it; makes padded chunks for models that take no rows.

The numbers that a forward pass needs about a row are computed on the host with numpy, without a loop over tokens, and
copied to the device at once. So no step waits for the device, and a thread can prepare the row while the step before
it runs. The bounds of the texts, `cu_seq_lens_q`, stay on the host as a numpy array, where sentence-transformers'
losses read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from tercet.model.grouped_attention import Layout, copied
from tercet.model.loss import Features
from tercet.model.text_groups import chunks

Numbers = npt.NDArray[np.integer[Any]]


class RowCollator:
    """Joins tokenized texts into one row: what `Transformer.preprocess` calls instead of padding.

    Does what transformers' DataCollatorWithFlattening does, without position ids and a list of all tokens."""

    def __call__(self, texts: Sequence[Mapping[str, Any]]) -> Features:
        """Return the features of a row. texts: `input_ids` of each, as a list."""
        lengths = [len(text["input_ids"]) for text in texts]
        ids = np.fromiter((token for text in texts for token in text["input_ids"]), np.int64, sum(lengths))
        return row_features(ids, lengths)


def row_features(ids: Numbers, lengths: Sequence[int] | Numbers) -> Features:
    """Return a row as sentence-transformers has it. ids: int64, of all texts, one after the other."""
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return {"input_ids": torch.from_numpy(ids)[None], "cu_seq_lens_q": bounds}


class Row:
    """A row of texts, and all numbers about it that a forward pass needs, in one block of memory."""

    def __init__(
        self, lengths: list[int], parts: dict[str, tuple[int, int, torch.dtype]], memory: torch.Tensor
    ) -> None:
        """parts: first element, number of elements, and type of each array in the memory."""
        self.lengths = lengths
        """Tokens of each text that is not empty, ascending."""
        self._parts, self._memory = parts, memory

    @classmethod
    def of(
        cls,
        bounds: Numbers,
        position_offset: int,
        prompts: Numbers | None = None,
        ids: npt.NDArray[np.int64] | None = None,
    ) -> Row:
        """Describe a row on the host.

        bounds: of the texts, shape (num_texts + 1,). position_offset: the first position's number. prompts: tokens to
        exclude from the pooling at the start of each text. A text that is all prompt, because it was truncated, stays
        whole. ids: of all tokens; without them, `place` takes the place of `input_ids`."""
        bounds = bounds.astype(np.int64)
        lengths = np.diff(bounds)
        order = np.argsort(lengths, kind="stable")
        ascending = lengths[order]
        ends = np.cumsum(ascending)
        positions = np.arange(bounds[-1]) - np.repeat(ends - ascending, ascending)
        place = np.repeat(bounds[order], ascending) + positions
        back = np.empty_like(place)
        back[place] = np.arange(len(place))
        pooled = lengths
        if prompts is not None:
            skipped = np.where(lengths > prompts, prompts, 0)
            is_pooled = np.arange(bounds[-1]) >= np.repeat(bounds[:-1] + skipped, lengths)
            back, pooled = back[is_pooled], lengths - skipped
        is_text = ascending > 0
        arrays: dict[str, Numbers] = {
            **({"place": place} if ids is None else {"input_ids": ids[place]}),
            "position_ids": positions + position_offset,
            "back": back,
            "seq_idx": np.repeat(np.arange(len(lengths)), pooled),
            "pooled_bounds": np.concatenate(([0], np.cumsum(pooled))).astype(np.int32),
            "attended_bounds": np.concatenate(([0], ends[is_text])).astype(np.int32),
        }
        return cls(ascending[is_text].tolist(), *_one_block(arrays))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return one of the arrays, as a view of the memory."""
        start, count, dtype = self._parts[name]
        return self._memory.view(dtype)[start : start + count]

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        device: torch.device = self._memory.device
        return device

    def pin_memory(self) -> Row:
        """Return the row in memory from which a GPU copies by itself. A DataLoader calls this in its thread."""
        return Row(self.lengths, self._parts, self._memory.pin_memory())

    def to(self, device: torch.device) -> Row:
        """Return the row on a device. To a GPU it is one copy, for which the host does not wait."""
        if device == self.device:
            return self
        return Row(self.lengths, self._parts, copied(self._memory, device))


def _one_block(arrays: dict[str, Numbers]) -> tuple[dict[str, tuple[int, int, torch.dtype]], torch.Tensor]:
    """Copy arrays into one block of memory, each at a multiple of 8 bytes. Return where they are, and the block."""
    block = np.empty(sum(-(-array.nbytes // 8) for array in arrays.values()), np.int64)
    parts, stop = {}, 0
    for name, array in arrays.items():
        start = stop * 8 // array.itemsize
        parts[name] = (start, len(array), torch.int32 if array.itemsize == 4 else torch.int64)
        block.view(array.dtype)[start : start + len(array)] = array
        stop += -(-array.nbytes // 8)
    return parts, torch.from_numpy(block)


class RowBatch:
    """All columns of a batch as one row."""

    def __init__(self, row: Row, num_texts: list[int], modality: str) -> None:
        """num_texts: of each column."""
        self.row, self.num_texts, self._modality = row, num_texts, modality

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text that is not empty, ascending. They are on the host."""
        return self.row.lengths

    def pin_memory(self) -> RowBatch:
        """Return the batch in pinned memory."""
        return RowBatch(self.row.pin_memory(), self.num_texts, self._modality)

    def to(self, device: torch.device) -> RowBatch:
        """Return the batch on a device."""
        return RowBatch(self.row.to(device), self.num_texts, self._modality)

    def embed(self, model: Any) -> list[torch.Tensor]:
        """Return the embeddings of each column, shape (num_texts, width), in one forward pass."""
        embeddings = model({"row": self.row, "modality": self._modality})["sentence_embedding"]
        return list(embeddings.split(self.num_texts))


class ChunkBatch:
    """All columns of a batch as padded chunks."""

    def __init__(self, parts: list[Features], back: torch.Tensor, num_texts: list[int], lengths: list[int]) -> None:
        """back: of each text of the columns, one after the other, its place in the chunks. num_texts: of each column.
        lengths: tokens of each text, ascending."""
        self._parts, self._back, self.num_texts, self.lengths = parts, back, num_texts, lengths

    def pin_memory(self) -> ChunkBatch:
        """Return the batch in pinned memory."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> ChunkBatch:
        """Return the batch on a device. The host does not wait for copies from pinned memory."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Any) -> ChunkBatch:
        parts = [
            {name: change(value) if isinstance(value, torch.Tensor) else value for name, value in part.items()}
            for part in self._parts
        ]
        return ChunkBatch(parts, change(self._back), self.num_texts, self.lengths)

    def embed(self, model: Any) -> list[torch.Tensor]:
        """Return the embeddings of each column, shape (num_texts, width), in one forward pass a chunk."""
        embeddings = torch.cat([model(dict(part))["sentence_embedding"] for part in self._parts])
        return list(embeddings[self._back].split(self.num_texts))


def row_batch(columns: Sequence[Features], drops_prompts: bool, position_offset: int) -> RowBatch:
    """Return a batch as one row. columns: of each, `input_ids` of shape (1, num_tokens), and `cu_seq_lens_q`.

    drops_prompts: the pooling excludes each text's prompt. position_offset: as `Row.of` takes it."""
    bounds = [np.asarray(features["cu_seq_lens_q"]) for features in columns]
    lengths = np.concatenate([np.diff(own) for own in bounds])
    num_texts = [len(own) - 1 for own in bounds]
    prompts = [int(features.get("prompt_length", 0)) for features in columns]
    row = Row.of(
        np.concatenate(([0], np.cumsum(lengths))),
        position_offset,
        np.repeat(prompts, num_texts) if drops_prompts and any(prompts) else None,
        np.concatenate([features["input_ids"][0].numpy(force=True) for features in columns]),
    )
    return RowBatch(row, num_texts, columns[0]["modality"])


def chunk_batch(columns: Sequence[Features]) -> ChunkBatch:
    """Return a batch as padded chunks, shortest texts first, each as wide as its longest text."""
    widest = max(features["input_ids"].shape[1] for features in columns)
    names = [name for name, value in columns[0].items() if isinstance(value, torch.Tensor) and value.ndim == 2]
    merged = {
        name: torch.cat([pad(features[name], (0, widest - features[name].shape[1])) for features in columns])
        for name in names
    }
    sorted_lengths, order = merged["attention_mask"].sum(dim=1).sort(stable=True)
    lengths: list[int] = sorted_lengths.tolist()
    parts = []
    for start, stop, width in chunks(lengths):
        rows = order[start:stop]
        part: Features = {name: value[rows, :width] for name, value in merged.items()}
        parts.append({**part, "modality": columns[0].get("modality", "text")})
    return ChunkBatch(parts, order.argsort(), [len(features["input_ids"]) for features in columns], lengths)


def forward_row(self: Any, features: Features, **kwargs: Any) -> Features:
    """Extends `Transformer.forward`: sorts the texts of a row by length, and restores their order in the results.

    features: a whole row that was made ahead, as `row`, or `input_ids` and `cu_seq_lens_q`; others are padded."""
    forward = type(self).forward
    if "row" not in features and "cu_seq_lens_q" not in features:
        padded: Features = forward(self, features, **kwargs)
        return padded
    if "row" in features:
        row = features["row"]
        input_ids = row["input_ids"][None]
    else:
        bounds = features["cu_seq_lens_q"]
        bounds = bounds.numpy(force=True) if isinstance(bounds, torch.Tensor) else bounds
        row = Row.of(bounds, self.position_offset).to(features["input_ids"].device)
        input_ids = features["input_ids"][:, row["place"]]
    given = {
        "input_ids": input_ids,
        "position_ids": row["position_ids"][None],
        "layout": Layout(row.lengths, row.device, self.attention, row["attended_bounds"]),
        "modality": features["modality"],
        # No mask has four dimensions and no element. transformers hands it on as it is, without a look at the position
        # ids, which on a GPU would wait for them; attention by the layout ignores it.
        "attention_mask": torch.empty(1, 1, 0, 0, device=row.device),
        **self.row_options,
    }
    embeddings = forward(self, given, **kwargs)["token_embeddings"].index_select(1, row["back"])
    result = {key: value for key, value in features.items() if key != "row"}
    # With `seq_idx`, the pooling need not compute it, which on a GPU would wait for the forward pass.
    return {
        **result,
        "token_embeddings": embeddings,
        "cu_seq_lens_q": row["pooled_bounds"],
        "seq_idx": row["seq_idx"][None],
    }
