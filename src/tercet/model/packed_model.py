"""Makes a model take many texts in one row, and all columns of a batch in one forward pass.

sentence-transformers 6.2 has a format for texts without padding, made for flash attention: the feature `cu_seq_lens_q`
holds the bounds of the texts in one row. Its tokenization, pooling, mini-batches and losses support it. Packing is that
format, with an attention that does not need flash attention, and with all columns in one row.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer

from tercet.model.dropout import use_fast_cpu_dropout
from tercet.model.fused_attention import SIXTEEN_BITS, SWITCH, cases_of, fused_obstacle, is_wanted, known_obstacle
from tercet.model.grouped_attention import Layout
from tercet.model.loss import Features, loss_of
from tercet.model.packed_attention import PACKED_ATTENTION, attend, bounds_obstacle
from tercet.model.row import ChunkBatch, RowBatch, RowCollator, chunk_batch, forward_row, row_batch
from tercet.planning import packing
from tercet.planning.packing import Attention, Facts, Packing

# Features that a model's forward pass gets in addition to the names in its signature.
ROW_KEYS = {"position_ids", "layout", "attention_mask"}


class Forward(NamedTuple):
    """How the texts of a batch share a forward pass of the model, and why."""

    packing: Packing
    reason: str
    is_cached: bool = False
    drops_prompts: bool = False
    position_offset: int = 0
    """The number of a text's first position."""

    @property
    def is_together(self) -> bool:
        """Whether tercet embeds all columns together before it calls the loss. Otherwise the loss calls the model."""
        return self.packing != "plain" and not self.is_cached

    def loss(self, loss: Any, model: Any, columns: list[Features], labels: torch.Tensor | None = None) -> Any:
        """Embed the columns of a batch, and return what `loss` returns for them: a scalar with its graph.

        loss: one without gradient caching. model: may be wrapped. labels: shape (num_rows,), if the loss needs them."""
        assert self.is_together
        return loss_of(loss, columns, self.embed(model, columns), labels)

    def embed(self, model: Any, columns: list[Features]) -> list[torch.Tensor]:
        """Return the embeddings of each column, shape (num_texts, width), in as few forward passes as possible."""
        return self.batch(columns).to(columns[0]["input_ids"].device).embed(model)

    def batch(self, columns: list[Features]) -> RowBatch | ChunkBatch:
        """Return the columns of a batch as the forward pass takes them. It can be made ahead, in a thread."""
        if self.packing == "packed":
            return row_batch(columns, self.drops_prompts, self.position_offset)
        return chunk_batch(columns)


def prepare(
    model: SentenceTransformer,
    chosen: Packing,
    is_cached: bool = False,
    guide: SentenceTransformer | None = None,
    attention: Attention | None = None,
    reason: str = "",
) -> Forward:
    """Return the forward pass that `choose_packing` chose, and change the models if they are to take rows.

    is_cached: the loss calls the model for each of its own mini-batches, each of which is packed separately. guide:
    another model, which the loss gives the same features. attention: as `Layout` takes it."""
    if chosen == "packed":
        for each in (model, *([guide] if guide is not None else [])):
            take_rows(each, attention)
    position_offset = model[0].position_offset if chosen == "packed" else 0
    return Forward(chosen, reason, is_cached, facts_of(model).drops_prompts, position_offset)


def kernel_obstacle(model: SentenceTransformer, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a packed model does not use the attention kernel that knows the bounds of texts; None if it does.

    dtype: of its activations. Tries the kernel out on this device where it might be used."""
    config = model[0].model.config
    if device.type != "cuda" or dtype not in SIXTEEN_BITS:
        return f"it needs a GPU and 16 bits, and here is {device.type} with {str(dtype).removeprefix('torch.')}"
    if config.model_type == "mpnet":
        return "it does not add a position bias, which MPNet has"
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return bounds_obstacle(device, dtype, head_width)


def fused_kernel_obstacle(model: SentenceTransformer, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a new run of a packed model does not use `fused_attention`; None if it does.

    dtype: of its activations. Tries the kernel out on this device where it might be used."""
    if not is_wanted():
        return f"the environment variable {SWITCH} is not 1"
    encoder = model[0].model
    if encoder.config.model_type == "mpnet":
        return "it computes no gradient of a position bias, which MPNet has"
    cases = cases_of(encoder)
    # Layers of a kind that no GPU can run in this way use matrices; all others must pass.
    to_try = [case for case in cases if known_obstacle(dtype, case) is None] or cases
    return next((why for case in to_try if (why := fused_obstacle(device, dtype, case))), None)


def facts_of(model: SentenceTransformer, is_cached: bool = False) -> Facts:
    """Return the facts about a loaded model that its files give too, but for the guide."""
    encoder = getattr(model[0], "model", None)
    pooling = next((module for module in model if type(module).__name__ == "Pooling"), None)
    config = getattr(encoder, "config", None)
    return Facts(
        model_type=getattr(config, "model_type", None),
        own_code=encoder is not None and not type(encoder).__module__.startswith("transformers.models."),
        is_cached=is_cached,
        drops_prompts=pooling is not None and not pooling.include_prompt,
        pads_left=getattr(model.tokenizer, "padding_side", "right") == "left",
        other_modules=packing.other_modules(type(module).__name__ for module in model),
    )


def takes_rows(encoder: Any) -> bool:
    """Return whether an encoder's code lets tercet put an attention of its own in place of the model's."""
    return bool(encoder.config.model_type == "mpnet" or getattr(encoder, "_supports_attention_backend", False))


def take_rows(model: SentenceTransformer, attention: Attention | None = None) -> None:
    """Make a model tokenize into rows and run on them, in `encode` too. Padded features still work.

    Sets what sentence-transformers 6.2 sets if flash attention is installed. Nothing of it is saved with the model."""
    transformer = model[0]
    encoder = transformer.model
    if encoder.config.model_type == "mpnet":  # has its own attention code
        for layer in encoder.encoder.layer:
            layer.attention.attn.forward = MethodType(_mpnet_attention, layer.attention.attn)
        encoder.forward = MethodType(_mpnet_forward, encoder)
    else:
        encoder.set_attn_implementation(PACKED_ATTENTION)
    use_fast_cpu_dropout(encoder)
    transformer.data_collator = RowCollator()
    # The features have no position ids, to which sentence-transformers would add it.
    transformer._flatten_position_offset = 0
    transformer.position_offset = transformer._infer_flatten_position_offset()
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= ROW_KEYS
    # Keys and values that no later token will ask for would be kept until the end of the forward pass.
    takes_cache = "use_cache" in inspect.signature(type(encoder).forward).parameters
    transformer.row_options = {"use_cache": False} if takes_cache else {}
    transformer.can_flatten_inputs = True
    transformer.attention = attention
    # A bound method, so that a deep copy of the model gets one of its own.
    transformer.forward = MethodType(forward_row, transformer)


def _mpnet_forward(self: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
    """Extends `MPNetModel.forward` of transformers 5.23, which would make a matrix over all tokens of the row."""
    if layout is None:
        return type(self).forward(self, **kwargs)
    hidden = self.embeddings(input_ids=kwargs["input_ids"], position_ids=kwargs["position_ids"])
    bias = self.encoder.compute_position_bias(hidden.new_empty(1, layout.max_length))[0]
    for layer in self.encoder.layer:
        (hidden,) = layer(hidden, layout, bias)
    return {"last_hidden_state": hidden}


def _mpnet_attention(
    self: Any, hidden_states: torch.Tensor, attention_mask: Any = None, position_bias: Any = None, **kwargs: Any
) -> Any:
    """Extends `MPNetSelfAttention.forward`: takes a layout in place of the attention mask."""
    if not isinstance(attention_mask, Layout):
        return type(self).forward(self, hidden_states, attention_mask, position_bias, **kwargs)
    width = self.attention_head_size
    hidden = hidden_states.squeeze(0)
    query, key, value = (linear(hidden).unflatten(-1, (-1, width)) for linear in (self.q, self.k, self.v))
    dropout = self.dropout.p if self.training else 0.0
    output = attend(query, key, value, attention_mask, width**-0.5, dropout, bias=position_bias)
    return (self.o(output.flatten(1))[None],)
