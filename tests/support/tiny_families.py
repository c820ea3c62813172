"""A tiny random SentenceTransformer of each family of encoders, built offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from support.tiny_model import tiny_tokenizer

HIDDEN = 32
MAX_LENGTH = 48

_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_LENGTH + 8,
}
FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "modernbert", "distilbert")

# Encoders and decoders of further families: keyword arguments of their configuration beside _SIZES.
_BERT_LIKE = {"type_vocab_size": 2}
_WITH_TYPES = {"type_vocab_size": 2, "pad_token_id": 0}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_SLIDING = {**_GROUPED, "sliding_window": 5}
FURTHER: dict[str, dict[str, Any]] = {
    "electra": {**_BERT_LIKE, "embedding_size": HIDDEN},
    "ernie": {**_BERT_LIKE, "use_task_id": True, "pad_token_id": 0},
    "nomic_bert": _WITH_TYPES,
    "gte": {**_WITH_TYPES, "pad_token_id": 1},
    "jina_embeddings_v3": {"type_vocab_size": 1, "pad_token_id": 1},
    "eurobert": {**_GROUPED, "mask_token_id": 4},
    "llama": _GROUPED,
    "mistral": _SLIDING,
    "qwen2": {**_SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": _GROUPED,
    "gemma3_text": {**_SLIDING, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "embeddinggemma": {
        **_SLIDING,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
        "use_bidirectional_attention": True,
    },
}
# Families that cannot be packed, for a reason each.
REFUSED: dict[str, dict[str, Any]] = {
    "gemma2": _GROUPED,
    "deberta-v2": {"type_vocab_size": 0, "pad_token_id": 0},
    "lfm2": {"num_key_value_heads": 2, "pad_token_id": 0, "layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {**_GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "llama": {
        **_GROUPED,
        "max_position_embeddings": MAX_LENGTH // 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "embeddinggemma")


def _config(family: str, vocab_size: int, dropout: float) -> PretrainedConfig:
    shared: dict[str, Any] = {"vocab_size": vocab_size, **_SIZES}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        return BertConfig(**shared, **drops)
    if family in FURTHER or family.startswith("refused "):
        drops |= {"attention_dropout": dropout}
        kind = "gemma3_text" if family == "embeddinggemma" else family.removeprefix("refused ")
        return AutoConfig.for_model(kind, **{**shared, **drops, **(FURTHER.get(family) or REFUSED[kind])})
    if family in ("roberta", "xlm-roberta", "camembert"):
        # Position ids start after the id of the padding token.
        kind = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig}[family]
        return kind(**shared, **drops, **{**special, "pad_token_id": 1})
    if family == "mpnet":
        return MPNetConfig(**shared, **drops, **{**special, "pad_token_id": 1}, relative_attention_num_buckets=32)
    if family == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names |= {"intermediate_size": "hidden_dim"}
        return DistilBertConfig(
            **{names.get(key, key): value for key, value in shared.items()}, dropout=dropout, attention_dropout=dropout
        )
    assert family == "modernbert"
    return ModernBertConfig(
        **shared,
        **special,
        cls_token_id=2,
        sep_token_id=3,
        local_attention=8,
        global_attn_every_n_layers=2,
        attention_dropout=dropout,
        mlp_dropout=dropout,
        embedding_dropout=dropout,
    )


def tiny_encoder(
    folder: Path,
    family: str,
    texts: list[str],
    pooling: str | tuple[str, ...] = "mean",
    dropout: float = 0.0,
    include_prompt: bool = True,
    padding_side: str = "right",
) -> Path:
    """Random weights, larger than a model starts with: at that start all texts are nearly one point. With a Dense
    and a Normalize module."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(texts)
    tokenizer.model_max_length = MAX_LENGTH
    encoder = AutoModel.from_config(_config(family, len(tokenizer), dropout))
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    encoder.save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"), max_seq_length=MAX_LENGTH)
    pool = Pooling(HIDDEN, pooling_mode=pooling, include_prompt=include_prompt)
    dense = Dense(pool.get_embedding_dimension(), 24)
    SentenceTransformer(modules=[transformer, pool, dense, Normalize()], device="cpu").save_pretrained(
        str(folder / "model"), create_model_card=False
    )
    settings = folder / "model" / "tokenizer_config.json"  # sentence-transformers loads an encoder to pad on the right
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": padding_side}))
    return folder / "model"
