"""Choose how texts share a forward pass: in one packed row, in padded chunks, or not at all.

In one row of real tokens, linear layers, norms and activations need no padding; only attention needs to know where each
text begins (model/packed_attention.py, model/grouped_attention.py). A trial (model/packing_trial.py) decides whether a
model can be packed. Everything else is read from the model's files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tercet.config.losses import GuidedLossConfig
from tercet.config.recipe import Config
from tercet.config.sections import ModelConfig
from tercet.planning.model_files import locate, native_config, reading
from tercet.storage import Storage
from tercet.storage.documents import Document, unseal
from tercet.storage.layout import forward_key

Packing = Literal["packed", "chunked", "plain"]

Attention = Literal["matrices", "bounds", "fused"]
"""The kernel for rows of texts: matrices over groups of texts; torch's `varlen_attn`, which knows the bounds of texts
but no dropout; or torch's kernels with bounds, dropout and 32 bits."""

# Modules that process each text, or each token, independently of how far a batch is padded.
TEXT_BY_TEXT = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LayerNorm")

# How the reasons of a choice begin. They are stored.
ONE_ROW, NOT_PACKED, OF_GUIDE = "one row of real tokens, no padding", "not packed: ", "the guide: "

# More padded chunks need less padding, but each is a forward pass. Four were faster than two; more were not tried.
NUM_CHUNKS = 4


class Facts(NamedTuple):
    """Facts about a model and its loss that determine how texts can share a forward pass."""

    model_type: str | None
    """`model_type` of config.json."""
    own_code: bool
    """Whether the architecture is Python code in the model's folder."""
    is_cached: bool
    """Whether the loss itself embeds mini-batches of one column."""
    drops_prompts: bool = False
    """Whether pooling excludes the tokens of prompts."""
    pads_left: bool = False
    """Whether the tokenizer pads on the left."""
    other_modules: tuple[str, ...] = ()
    """Class names of modules that are not in TEXT_BY_TEXT."""
    guide_type: str | None = None
    """`model_type` of the guide of the loss, which gets the same features; None without a guide."""


class ForwardChoice(Document):
    """What a run chose when it began, and why."""

    packing: Packing
    reason: str
    attention: Attention
    """The kernel for rows of texts."""

    @property
    def is_due_to_guide(self) -> bool:
        """Whether only the guide of the loss cannot be packed."""
        return self.reason.startswith(f"{NOT_PACKED}{OF_GUIDE}")

    @property
    def is_untried(self) -> bool:
        """Whether the run is packed by the rule before there was a trial: a list of architectures."""
        return self.reason == ONE_ROW


def stored_choice(storage: Storage, run_id: str) -> ForwardChoice | None:
    """Return what a run chose when it began; None if it has not begun, or if its recipe names a way without a trial.

    Raises CorruptObject if it is damaged."""
    key = forward_key(run_id)
    if not storage.exists(key):
        return None
    return unseal(ForwardChoice, storage.read(key), storage.uri_of(key), hint="choose a new --run-id")


def needs_trial(wanted: Literal["auto"] | Packing) -> bool:
    """Return whether a trial decides, because packing is wanted where it is possible."""
    return wanted in ("auto", "packed")


def without_rows(wanted: Literal["auto"] | Packing, facts: Facts, refusal: str = "") -> tuple[Packing, str]:
    """Return how a model that is not packed runs its forward pass, and the reason.

    refusal: why the model cannot be packed, if the recipe does not name another way."""
    if wanted == "plain":
        return "plain", "as the recipe says"
    why = "as the recipe says" if wanted == "chunked" else f"{NOT_PACKED}{refusal}"
    if facts.other_modules:
        return "plain", f"{why}; not chunked: its module {facts.other_modules[0]} may mix several texts"
    if facts.is_cached:
        return "plain", f"{why}; not chunked: the loss makes its own mini-batches"
    if facts.drops_prompts:
        return "plain", f"{why}; not chunked: pooling cannot exclude the different prompts in a chunk"
    if facts.pads_left:
        return "plain", f"{why}; not chunked: the tokenizer pads on the left"
    return "chunked", f"{why}; {NUM_CHUNKS} chunks of similar lengths"


def expected(wanted: Literal["auto"] | Packing, facts: Facts) -> Packing:
    """Return how training will probably run the forward pass, before any trial has run.

    Architectures of transformers pass the trial as a rule, code in a model's folder does not."""
    if needs_trial(wanted) and not facts.own_code:
        return "packed"
    return without_rows(wanted, facts)[0]


def describe(wanted: Literal["auto"] | Packing, facts: Facts) -> str:
    """Return how training will run the forward pass and why, in words, before any trial has run."""
    if not needs_trial(wanted):
        packing, why = without_rows(wanted, facts)
        return f"{packing}  ({why})"
    kinds = " and ".join(kind or "unknown type" for kind in dict.fromkeys([facts.model_type, *_guide(facts)]))
    code = ", whose code is in the model's folder," if facts.own_code else ""
    expected = (
        f"packed  (one row of real tokens, no padding, if the worker's trial on a small random copy of {kinds}{code} "
        "gives the embeddings and gradients of padded texts"
    )
    if wanted == "packed":
        return f"{expected}; otherwise the run ends with an error)"
    fallback, _ = without_rows(wanted, facts)
    return f"{expected}; otherwise {fallback})"


def _guide(facts: Facts) -> tuple[str, ...]:
    return () if facts.guide_type is None else (facts.guide_type,)


def other_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Return those class names of modules that may mix several texts."""
    return tuple(name for name in names if name not in TEXT_BY_TEXT)


def read_packing_facts(config: Config, folder: Path | None) -> Facts | None:
    """Read the facts of the recipe's model, whose files are in `folder`, and of the guide of its loss.

    None if the files of either are not on this machine. Raises ConfigError if one of their files cannot be read, and
    otherwise as `locate` for the guide."""
    facts = _of_model(config.model, folder, config.loss.is_cached)
    if facts is None or not isinstance(config.loss, GuidedLossConfig):
        return facts
    model = ModelConfig(name_or_path=config.loss.guide)
    guide = _of_model(model, locate(model), config.loss.is_cached)
    return None if guide is None else facts._replace(guide_type=guide.model_type or "unknown type")


def _of_model(model: ModelConfig, folder: Path | None, is_cached: bool) -> Facts | None:
    if folder is None:
        return None
    with reading(folder):
        return _read_facts(model, folder, is_cached)


def _read_facts(model: ModelConfig, folder: Path, is_cached: bool) -> Facts:
    transformer = _module(folder, "Transformer") or folder
    config, pooling = native_config(model, folder).config or _config(transformer), _pooling(folder)
    return Facts(
        model_type=config.get("model_type"),
        own_code=model.trust_remote_code and "auto_map" in config,
        is_cached=is_cached,
        drops_prompts=pooling is not None and not pooling.get("include_prompt", True),
        pads_left=_read(transformer / "tokenizer_config.json").get("padding_side") == "left",
        other_modules=other_modules(_type_names(folder)),
    )


def _pooling(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the Pooling module; None without one. A folder without modules.json gets mean pooling."""
    if not (folder / "modules.json").is_file():
        return {"pooling_mode": "mean"}
    module = _module(folder, "Pooling")
    return None if module is None else _config(module)


def _module(folder: Path, name: str) -> Path | None:
    modules = _read(folder / "modules.json") or []
    return next((folder / module["path"] for module in modules if module["type"].endswith(f".{name}")), None)


def _type_names(folder: Path) -> list[str]:
    return [module["type"].rpartition(".")[2] for module in _read(folder / "modules.json") or []]


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = _read(folder / "config.json")
    return config


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
