"""Decides by a trial whether a model can be packed.

A small random copy of the model gets the same texts twice, padded and in one row. The copy has the model's
architecture, tokenizer, pooling and further modules, no dropout, and a layer or two of each kind. Packed and padded
embeddings, and the gradients of all weights, must agree in fp32. The trial runs on the CPU and takes about a second. It
checks that the model's code hands on to attention where each text begins, and positions, windows and causality with it.
`kernel_obstacle` tries the kernels of the device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import PretrainedConfig

from tercet.errors import PlanError, first_line
from tercet.model.loss import Features
from tercet.model.packed_attention import UnsupportedAttention
from tercet.model.packed_model import Forward, facts_of, prepare, takes_rows
from tercet.model.sharding import unsharded
from tercet.planning import packing
from tercet.planning.packing import ForwardChoice, Packing

# Largest difference between packed and padded values, relative to the largest of them. Rounding gives 1e-6 to 1e-5; a
# window that is wrong by one token, or positions that are not those of the text, give more than 1e-2.
MAX_ERROR = 1e-3
MORE_PADDING = 9

# Words of each text of two columns: a single word, equal lengths, and several times WINDOW. They make the padded
# columns unequally wide, and long and short texts neighbours in the row.
NUM_WORDS = ((5, 1, 23, 9), (2, 31, 5))

# Limits of the copy. Attention windows are shorter than most texts, so that a wrong one shows.
WINDOW = 6
MAX_VOCABULARY, MAX_INTERMEDIATE, MAX_KINDS_OF_LAYERS, MAX_KEY_HEADS, MAX_PROJECTION = 512, 256, 6, 2, 2**22
# Numbers of tokens in configurations: `sliding_window`, `local_attention`, `attention_chunk_size`, `index_topk`.
# Not `max_window_layers`.
WINDOW_NAMES = re.compile(r"window(_size|_len)?$|^local_attention$|attention_chunk_size$|^index_topk$")


class Trial(NamedTuple):
    """The outcome of a trial."""

    refusal: str | None
    """Why the model cannot be packed; None if it can."""
    error: float = 0.0
    """Largest relative difference between packed and padded embeddings or gradients."""


def choose_packing(
    model: SentenceTransformer,
    wanted: Literal["auto"] | Packing,
    is_cached: bool = False,
    guide: SentenceTransformer | None = None,
) -> tuple[Packing, str]:
    """Choose how the texts of a batch share `model`'s forward pass, and return the reason too. Changes nothing.

    is_cached: the loss calls the model for each of its own mini-batches. guide: another model, which the loss gives the
    same features. Raises PlanError where the recipe wants rows and the trial refuses them."""
    if not packing.needs_trial(wanted):
        return packing.without_rows(wanted, facts_of(model, is_cached))
    trial = try_rows(model)
    refusal, error = trial
    if guide is not None and refusal is None:
        of_guide = try_rows(guide)
        refusal, error = of_guide.refusal and f"{packing.OF_GUIDE}{of_guide.refusal}", max(error, of_guide.error)
    if refusal is None:
        return "packed", f"{packing.ONE_ROW}; a trial differs from padding by {error:.0e}"
    if wanted == "packed":
        raise PlanError(
            f"workers.packing is packed, but this model cannot be packed: {refusal}",
            hint="omit workers.packing: the next best way to run the model is chosen",
        )
    chosen, why = packing.without_rows(wanted, facts_of(model, is_cached), refusal)
    if chosen == "chunked" and (error := padding_error(model)) > MAX_ERROR:
        return "plain", f"{packing.NOT_PACKED}{refusal}; not chunked: padding changes its embeddings, by {error:.0%}"
    return chosen, why


def prepare_to_encode(model: SentenceTransformer, chosen: Literal["auto"] | Packing | ForwardChoice) -> None:
    """Make a model encode as the run that trained it does: in rows, if the run packs them and this machine can.

    chosen: what the run chose, or what the recipe names if it chose nothing."""
    if isinstance(chosen, ForwardChoice) and chosen.is_untried:
        prepare(model, "packed")
        return
    if isinstance(chosen, ForwardChoice):
        chosen = "auto" if chosen.is_due_to_guide else chosen.packing
    if packing.needs_trial(chosen):
        prepare(model, choose_packing(model, "auto")[0])


def try_rows(model: SentenceTransformer) -> Trial:
    """Run the trial of a model, which may be on any device and must not be wrapped.

    Neither the model nor any random state changes."""
    transformer = model[0]
    if not isinstance(transformer, Transformer) or not hasattr(transformer.model, "config"):
        return Trial(f"its first module is {type(transformer).__name__}, not a Transformer")
    if not takes_rows(transformer.model):
        owner = "its own code does" if facts_of(model).own_code else f"the code of {_kind(model)} does"
        return Trial(f"{owner} not call the attention interface of transformers")
    if (why := _varying_frequencies(model)) is not None:
        return Trial(why)
    try:
        with _undisturbed():
            error, name = _largest_error(small_copy(model))
    except MemoryError:
        raise
    except UnsupportedAttention as failure:
        return Trial(failure.message[:1].lower() + failure.message[1:].rstrip("."))
    except Exception as failure:  # noqa: BLE001 - code of any model, with inputs that it may not have been made for
        why = first_line(failure) if type(failure) is ValueError else _in_words(failure)
        return Trial(f"in a trial on a small random copy of {_kind(model)}, {why}")
    if not error <= MAX_ERROR:
        return Trial(f"in a trial on a small random copy of {_kind(model)}, {name} differs by {error:.1%}", error)
    return Trial(None, error)


def padding_error(model: SentenceTransformer) -> float:
    """Return by how much more padding changes the embeddings of a small random copy, relative to the largest value.

    0.0 where the copy cannot be tried. Convolutions, landmarks and sums over all places see padding."""
    try:
        with _undisturbed():
            small = small_copy(model)
            features = _columns(small)[0]
            config = small[0].model.config.get_text_config()
            fill = {"input_ids": getattr(config, "pad_token_id", None) or 0, "attention_mask": 0}
            wider = {
                name: torch.nn.functional.pad(value, (0, MORE_PADDING), value=fill.get(name, 0))
                if isinstance(value, torch.Tensor) and value.ndim == 2
                else value
                for name, value in features.items()
            }
            narrow, wide = (small(dict(each))["sentence_embedding"].detach() for each in (features, wider))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - code of any model, with inputs that it may not have been made for
        return 0.0
    return float((wide - narrow).abs().max() / narrow.abs().max())


def _kind(model: SentenceTransformer) -> str:
    return str(getattr(model[0].model.config, "model_type", None) or type(model[0].model).__name__)


def _in_words(failure: Exception) -> str:
    return f"{type(failure).__name__}: {first_line(failure)}"


def _varying_frequencies(model: SentenceTransformer) -> str | None:
    """Return why rotary frequencies depend on the longest text of a batch, which is another one in a row; or None."""
    for config in _configs(model[0].model.config):
        rope = getattr(config, "rope_parameters", None) or {}
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            kind, longest = part.get("rope_type"), model.max_seq_length
            known = part.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
            if kind in ("dynamic", "longrope") and (not longest or not known or longest > known):
                return (
                    f"its rotary positions ({kind}) depend on the longest text of a batch beyond {known} tokens; "
                    "set model.max_seq_length to that or less"
                )
    return None


def _undisturbed() -> Any:
    """Return a context in which gradients are kept in fp32, and which leaves random state and global modes alone."""
    from contextlib import ExitStack

    stack = ExitStack()
    for context in (
        unsharded(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        # The first evaluation or a recomputed layer must not count the tensors that are saved here.
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    ):
        stack.enter_context(context)
    return stack


def _largest_error(model: SentenceTransformer) -> tuple[float, str]:
    """Return the largest relative difference between packed and padded values of a copy, and what differs."""
    expected = _embeddings_and_gradients(model, None)
    try:
        actual = _embeddings_and_gradients(model, prepare(model, "packed"))
    except (RuntimeError, TypeError, IndexError, KeyError) as failure:
        raise ValueError(f"it does not run on a row of texts ({_in_words(failure)})") from failure
    if expected.keys() != actual.keys():
        raise ValueError(f"{min(expected.keys() ^ actual.keys())} exists in one of both ways only")
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "the embedding")
    errors = []
    for name, value in expected.items():
        # Some gradients are zero but for rounding, such as those of the biases of keys.
        scale = max(float(value.abs().max()), 0.01 * largest if name != "the embedding" else 0.0)
        errors.append((float((actual[name] - value).abs().max()) / scale, name))
    # NaN is larger than everything.
    return max(errors, key=lambda each: (each[0] != each[0], each[0]))


def _embeddings_and_gradients(model: SentenceTransformer, forward: Forward | None) -> dict[str, torch.Tensor]:
    """Return the embeddings of the trial's texts, and the gradients of the weights by name.

    forward: of a model that takes rows; None for padded columns, one after the other."""
    columns = _columns(model)
    if forward is None:
        embeddings = torch.cat([model(features)["sentence_embedding"] for features in columns])
    elif all("cu_seq_lens_q" in features for features in columns):
        embeddings = torch.cat(forward.embed(model, columns))
    else:
        raise ValueError("its texts are tokenized into padded batches only")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    draw = torch.Generator().manual_seed(1)
    direction = torch.randn(embeddings.shape, generator=draw)
    gradients = torch.autograd.grad(embeddings, list(weights.values()), direction, allow_unused=True)
    named = zip(weights, gradients, strict=True)
    return {
        "the embedding": embeddings.detach(),
        **{f"the gradient of {name}": gradient for name, gradient in named if gradient is not None},
    }


def _columns(model: SentenceTransformer) -> list[Features]:
    """Return the features of two columns of texts, as the model tokenizes them, with random tokens in their places.

    The first has the model's longest prompt. Tokens are random because a tokenizer may know none of the words."""
    prompt = max(model.prompts.values(), key=len, default="") or None
    draw, config = torch.Generator().manual_seed(2), model[0].model.config.get_text_config()
    padding = getattr(config, "pad_token_id", None)
    columns = []
    for num_words, prompt_of_column in zip(NUM_WORDS, (prompt, None), strict=True):
        texts = [" ".join("abcdefghijklmnopqrstuvwxyz"[word % 26] for word in range(count)) for count in num_words]
        features: Features = model.preprocess(texts, prompt=prompt_of_column)
        tokens = features["input_ids"]
        is_token = features["attention_mask"].bool() if "attention_mask" in features else torch.ones_like(tokens).bool()
        drawn = torch.randint(config.vocab_size - 1, (int(is_token.sum()),), generator=draw)
        drawn += drawn >= (config.vocab_size if padding is None else padding)  # any but that of padding
        features["input_ids"] = torch.full_like(tokens, padding or 0).masked_scatter(is_token, drawn.to(tokens.dtype))
        columns.append(features)
    return columns


def small_copy(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model of the same architecture and modules, with few layers and random weights, on the CPU."""
    transformer = model[0]
    clone = copy.copy(transformer)
    clone.__dict__ = dict(transformer.__dict__)
    for name in ("forward", "can_flatten_inputs"):  # of a model that takes rows
        clone.__dict__.pop(name, None)
    clone._modules = dict(transformer._modules)
    clone.can_flatten_inputs = False
    if clone.model_forward_params is not None:
        clone.model_forward_params = set(clone.model_forward_params)
    clone.model = small_encoder(transformer.model)
    others = [copy.deepcopy(module).to("cpu", torch.float32) for module in list(model)[1:]]
    small = SentenceTransformer(modules=[clone, *others], device="cpu", prompts=dict(model.prompts))
    for module in small.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return small.requires_grad_(True).train()


def small_encoder(encoder: Any) -> Any:
    """Return an encoder of the same class, with few layers and random weights."""
    config = copy.deepcopy(encoder.config)
    for part in _configs(config):
        _shrink(part)
    attention = config._attn_implementation
    usable = attention if attention in ("eager", "sdpa") else "sdpa"
    small = type(encoder)._from_config(config, dtype=torch.float32, attn_implementation=usable)
    draw = torch.Generator().manual_seed(0)
    tables = {id(module.weight) for module in small.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for weight in small.parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if id(weight) in tables:
                weight.copy_(noise)
            elif weight.ndim > 1:
                # Scores vary by more than 1, so that it matters which tokens attention sees, and at which places.
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.1 * noise)
    return small


def _configs(config: PretrainedConfig) -> Iterable[PretrainedConfig]:
    """Yield a configuration and those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield from _configs(part)


def _shrink(config: PretrainedConfig) -> None:
    """Make a configuration small in what does not decide whether rows are right, and take out what is random."""
    stored = config.to_dict()
    num_layers = getattr(config, "num_hidden_layers", None)
    if isinstance(num_layers, int):
        kept = _kept_layers(stored, num_layers)
        for name, value in stored.items():
            if isinstance(value, list) and len(value) == num_layers:
                setattr(config, name, [value[layer] for layer in kept])
        config.num_hidden_layers = len(kept)
    for name, value in stored.items():
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
        if WINDOW_NAMES.search(name) and isinstance(value, int) and value > WINDOW:
            setattr(config, name, WINDOW)
    if isinstance(stored.get("intermediate_size"), int):
        config.intermediate_size = min(config.intermediate_size, MAX_INTERMEDIATE)
    heads, key_heads = stored.get("num_attention_heads"), stored.get("num_key_value_heads")
    # Where a head has a width of its own, fewer of them change no other size.
    is_large = (heads or 0) * (stored.get("head_dim") or 0) * (stored.get("hidden_size") or 0) > MAX_PROJECTION
    if is_large and key_heads and key_heads > MAX_KEY_HEADS and heads % key_heads == 0:
        config.num_key_value_heads = MAX_KEY_HEADS
        config.num_attention_heads = MAX_KEY_HEADS * (heads // key_heads)
    if isinstance(stored.get("vocab_size"), int):
        config.vocab_size = min(config.vocab_size, MAX_VOCABULARY)
        if getattr(config, "pad_token_id", None) is not None and config.pad_token_id >= config.vocab_size:
            config.pad_token_id = 0


def _kept_layers(stored: dict[str, Any], num_layers: int) -> list[int]:
    """Return the layers that the copy keeps: two, or one of each kind if there are more kinds."""
    lists = [value for value in stored.values() if isinstance(value, list) and len(value) == num_layers]
    first: dict[str, int] = {}
    for layer in range(num_layers):
        first.setdefault(repr([value[layer] for value in lists]), layer)
    kept = list(first.values())[:MAX_KINDS_OF_LAYERS]
    rest = [layer for layer in range(num_layers) if layer not in kept]
    return sorted([*kept, *rest[: max(0, 2 - len(kept))]])
