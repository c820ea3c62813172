"""The architecture `new` of stella_en_400M_v5 and the GTE models, which transformers 5.23 has natively under another
name: `gte`.

Their folders have `model_type: new`, and their code is in their repository. transformers converts the names of their
weights, but knows neither the model type nor the fixed NTK scaling of their rotary positions. `as_gte` translates the
configuration, so that nothing of a folder's own code runs.

The scaling (https://kexue.fm/archives/9706, equation 6) multiplies the base by a factor, and divides the inverse
frequencies by factor^(2 / dimensions of a head). The `linear` scaling of transformers divides inverse frequencies by a
number, so it expresses the same, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

MODEL_TYPE, NATIVE_TYPE = "new", "gte"

# The values that the architecture's own code has for keys that a configuration omits. None of those of `gte` is taken.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30528,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 2048,
    "type_vocab_size": 1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "classifier_dropout": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DEFAULT_THETA = 10000.0
# Switches of the architecture that `gte` does not have, with the only value that it can take for each.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "logn_attention_scale": False,
    "pack_qkv": True,
}
# Switches of a fast path, which change no result.
FAST_PATH = ("unpad_inputs", "use_memory_efficient_attention")

# Keys that are translated, so that they cannot be changed afterwards.
ROTARY = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})


def obstacle(config: dict[str, Any], names: Collection[str]) -> str | None:
    """Return why a model of type `new` cannot be loaded natively; None if it can.

    config: its configuration. names: of the tensors in its files."""
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            return f"{key} is {config[key]}, and transformers has only {value}"
    theta, scaling = _rotary(config)
    if not _is_positive(theta):
        return f"the base of rotary positions is {theta!r}, which is not a positive number"
    if scaling is not None and not (
        isinstance(scaling, dict)
        and scaling.get("type", scaling.get("rope_type")) == "ntk"
        and _is_positive(scaling.get("factor"))
        and scaling.get("mixed_b") is None
    ):
        return f"the scaling of rotary positions is {scaling}, and tercet knows only fixed NTK"
    own = {name.removeprefix("new.") for name in names}
    if missing := [name for name in _tensor_names(config) if name not in own]:
        return f"its files have no tensor {missing[0]}"
    return None


def is_encoder_tensor(name: str) -> bool:
    """Return whether a tensor of the files belongs to the encoder, and not to a head that is not loaded."""
    return name.removeprefix("new.").startswith(("embeddings.", "encoder."))


def as_gte(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a configuration without obstacles into the one of the native architecture."""
    size = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return {
        "model_type": NATIVE_TYPE,
        "architectures": ["GteModel"],
        **size,
        **({} if dtype is None else {"dtype": dtype}),
        "rope_parameters": _rope_parameters(config, size["hidden_size"] // size["num_attention_heads"]),
    }


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def _rotary(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the base of rotary positions and their scaling; None without one.

    transformers 5 writes both as `rope_parameters` when it saves a model, and `rope_scaling` no more."""
    parameters = config.get("rope_parameters")
    theta, scaling = config.get("rope_theta", _DEFAULT_THETA), config.get("rope_scaling")
    if isinstance(parameters, dict):
        theta = parameters.get("rope_theta", theta)
        if scaling is None and parameters.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return theta, scaling


def _rope_parameters(config: dict[str, Any], head_dim: int) -> dict[str, Any]:
    theta, scaling = _rotary(config)
    # The original code scales only what makes positions reach further.
    if scaling is None or scaling["factor"] <= 1:
        return {"rope_type": "default", "rope_theta": theta}
    factor = scaling["factor"]
    return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}


def _tensor_names(config: dict[str, Any]) -> list[str]:
    names = ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"]
    if config.get("type_vocab_size", _DEFAULTS["type_vocab_size"]):
        names.append("embeddings.token_type_embeddings.weight")
    with_bias = ("attention.qkv_proj", "attention.o_proj", "mlp.down_proj", "attn_ln", "mlp_ln")
    for layer in range(config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])):
        prefix = f"encoder.layer.{layer}."
        names += [f"{prefix}{module}.{part}" for module in with_bias for part in ("weight", "bias")]
        names.append(f"{prefix}mlp.up_gate_proj.weight")
    return names
