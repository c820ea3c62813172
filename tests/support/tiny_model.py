"""Models and data so small that a whole run takes seconds, all built offline.

The task can be learned: a positive is its anchor in another language, word by word (`WORDS` to their partners). An
untrained encoder knows no word of it, so its retrieval is near chance; after a few epochs it is much better.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

HIDDEN = 32
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = [first + second for first, second in zip(SYLLABLES[:30], SYLLABLES[30:], strict=True)]
PARTNERS = [word[::-1] + "x" for word in WORDS]


def triplets(num_rows: int = 240, seed: int = 0) -> list[dict[str, str]]:
    """Rows with a group each: two rows share a group, and no text occurs in two groups."""
    order = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[tuple[int, ...]] = set()
    while len(rows) < num_rows:
        chosen = tuple(order.sample(range(len(WORDS)), 3))
        if chosen in seen:
            continue
        seen.add(chosen)
        other = [chosen[0], *order.sample([index for index in range(len(WORDS)) if index not in chosen], 2)]
        rows.append(
            {
                "anchor": " ".join(WORDS[index] for index in chosen),
                "positive": " ".join(PARTNERS[index] for index in chosen),
                "negative": " ".join(PARTNERS[index] for index in other),
                "group": f"group-{len(rows) // 2}",
            }
        )
    return rows


def write_triplets(path: Path, num_rows: int = 240) -> Path:
    """Write triplets, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in triplets(num_rows)), encoding="utf-8")
    return path


def all_texts() -> list[str]:
    """All words that a triplet can contain."""
    return [*WORDS, *PARTNERS]


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A WordPiece tokenizer of the words of `texts`; any other word is split into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in texts for word in text.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    pieces = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def tiny_bert(
    folder: Path,
    texts: Iterable[str],
    dense_features: int | None = None,
    dropout: float = 0.0,
    pooler: bool = True,
    normalize: bool = False,
) -> Path:
    """A SentenceTransformer of two BERT layers, mean pooling and, if asked for, a Dense layer and a Normalize module.
    About 25,000 weights.

    BERT's own pooler is not used. Without it in the file, its weights are drawn at random when the model is loaded."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer(texts)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_modules(folder, dense_features, normalize)
    return folder


def _write_modules(folder: Path, dense_features: int | None, normalize: bool = False) -> None:
    """Turn a transformers folder into a sentence-transformers one: transformer, pooling, projection."""
    import torch
    from safetensors.torch import save_file

    names = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    paths = ["", "1_Pooling"]
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if dense_features is not None:
        names.append("base.modules.dense.Dense")
        paths.append("2_Dense")
        dense = folder / "2_Dense"
        dense.mkdir()
        activation = "torch.nn.modules.linear.Identity"
        sizes = {"in_features": HIDDEN, "out_features": dense_features, "bias": True, "activation_function": activation}
        (dense / "config.json").write_text(json.dumps(sizes))
        layer = torch.nn.Linear(HIDDEN, dense_features)
        save_file(
            {f"linear.{name}": value.data for name, value in layer.named_parameters()}, dense / "model.safetensors"
        )
    if normalize:
        names.append("sentence_transformer.modules.Normalize")
        paths.append("3_Normalize")
        (folder / "3_Normalize").mkdir()
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{name}"}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1))


# --- a model whose architecture is Python code in its own folder ----------------------------------------------------

STELLA_DENSE_FEATURES = 1024

_CONFIGURATION = '''"""The configuration of a tiny encoder with two switches for a fast path."""

from transformers import PretrainedConfig


class NewConfig(PretrainedConfig):
    model_type = "new"

    def __init__(
        self,
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        use_memory_efficient_attention=True,
        unpad_inputs=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.use_memory_efficient_attention = use_memory_efficient_attention
        self.unpad_inputs = unpad_inputs
        super().__init__(**kwargs)
'''

_MODELING = '''"""A tiny encoder. Its fast path needs a package that no test machine has."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration import NewConfig


class NewModel(PreTrainedModel):
    config_class = NewConfig
    base_model_prefix = "new"

    def __init__(self, config, **kwargs):
        super().__init__(config)
        if config.use_memory_efficient_attention or config.unpad_inputs:
            raise ImportError("the fast path needs xformers")
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.attention = torch.nn.ModuleList(
            torch.nn.MultiheadAttention(config.hidden_size, 2, batch_first=True)
            for _ in range(config.num_hidden_layers)
        )
        self.norms = torch.nn.ModuleList(
            torch.nn.LayerNorm(config.hidden_size) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_(std=0.02)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.embeddings(input_ids)
        padding = None if attention_mask is None else attention_mask == 0
        for attention, norm in zip(self.attention, self.norms):
            mixed, _ = attention(hidden, hidden, hidden, key_padding_mask=padding, need_weights=False)
            hidden = norm(hidden + mixed)
        return BaseModelOutput(last_hidden_state=hidden)
'''


def tiny_stella(folder: Path) -> Path:
    """The shape of dunzhang/stella_en_400M_v5, in miniature: an architecture in code of its own folder, with fast-path
    switches that are on by default and cannot work here; mean pooling; a Dense layer of 1,024 features."""
    import torch
    from safetensors.torch import save_file

    tokenizer = tiny_tokenizer(all_texts())
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "configuration.py").write_text(_CONFIGURATION)
    (folder / "modeling.py").write_text(_MODELING)
    config = {
        "architectures": ["NewModel"],
        "auto_map": {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"},
        "model_type": "new",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "use_memory_efficient_attention": True,
        "unpad_inputs": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {"embeddings.weight": 0.5 * torch.randn(len(tokenizer), HIDDEN)}
    for layer in range(2):
        for name, value in torch.nn.MultiheadAttention(HIDDEN, 2).named_parameters():
            weights[f"attention.{layer}.{name}"] = value.data
        for name, value in torch.nn.LayerNorm(HIDDEN).named_parameters():
            weights[f"norms.{layer}.{name}"] = value.data
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_modules(folder, STELLA_DENSE_FEATURES)
    return folder


def tiny_new(folder: Path, scaling: dict[str, Any] | None = None, prefix: str = "") -> Path:
    """The files of dunzhang/stella_en_400M_v5 in miniature: its configuration, its names of weights, code that must
    not run, mean pooling, and a Dense layer of 1,024 features.

    scaling: `rope_scaling` of the configuration; fixed NTK with factor 2 by default. prefix: of the names."""
    import torch
    from safetensors.torch import save_file

    tokenizer = tiny_tokenizer(all_texts())
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "configuration.py").write_text("raise SystemExit('the code of the folder ran')\n")
    (folder / "modeling.py").write_text("raise SystemExit('the code of the folder ran')\n")
    num_words = len(tokenizer) + 6  # the vocabulary is padded
    config = {
        "architectures": ["NewModel"],
        "auto_map": {"AutoConfig": "configuration.NewConfig", "AutoModel": "modeling.NewModel"},
        "model_type": "new",
        "vocab_size": num_words,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * HIDDEN,
        "hidden_dropout_prob": 0.1,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "position_embedding_type": "rope",
        "layer_norm_type": "layer_norm",
        "pack_qkv": True,
        "rope_theta": 160000,
        "rope_scaling": {"type": "ntk", "factor": 2.0} if scaling is None else scaling,
        "unpad_inputs": True,
        "use_memory_efficient_attention": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shapes = {"embeddings.word_embeddings.weight": (num_words, HIDDEN)}
    shapes["embeddings.token_type_embeddings.weight"] = (2, HIDDEN)
    linear = {"attention.qkv_proj": (3 * HIDDEN, HIDDEN), "attention.o_proj": (HIDDEN, HIDDEN)}
    linear["mlp.down_proj"] = (HIDDEN, 2 * HIDDEN)
    for layer in range(2):
        start = f"encoder.layer.{layer}"
        for name, shape in linear.items():
            shapes[f"{start}.{name}.weight"], shapes[f"{start}.{name}.bias"] = shape, shape[:1]
        shapes[f"{start}.mlp.up_gate_proj.weight"] = (4 * HIDDEN, HIDDEN)
    norms = ["embeddings.LayerNorm", *(f"encoder.layer.{n}.{norm}" for n in range(2) for norm in ("attn_ln", "mlp_ln"))]
    torch.manual_seed(0)
    weights = {f"{prefix}{name}": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    for name in norms:
        weights[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(HIDDEN)
        weights[f"{prefix}{name}.bias"] = 0.1 * torch.randn(HIDDEN)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_modules(folder, STELLA_DENSE_FEATURES)
    return folder


def add_layers(module: Any, seed: int) -> None:
    """Give a module of torch two layers, a buffer, and one tensor under two names."""
    import torch

    torch.manual_seed(seed)
    module.first = torch.nn.Linear(3, 4)
    module.norm = torch.nn.BatchNorm1d(4)
    module.norm.running_mean = torch.randn(4)
    module.table = torch.nn.Embedding(5, 3)
    module.tied = torch.nn.Linear(3, 5, bias=False)
    module.tied.weight = module.table.weight


# --- recipes --------------------------------------------------------------------------------------------------------


def recipe(model: Path | str, storage: Path | str, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe that learns the task. `sections` replace its keys one by one; a `loss` replaces the whole section."""
    document: dict[str, Any] = {
        "name": "tiny",
        "storage": {"uri": str(storage)},
        "dataset": {"name": "tiny"},
        "model": {"name_or_path": str(model)},
        "loss": {"name": "MultipleNegativesRankingLoss"},
        "checkpoint": {"keep_last": 100},
        "training": {"num_epochs": 3, "global_batch_size": 16, "learning_rate": 0.005, "log_every_steps": 1},
        "workers": {"num_workers": 1, "use_gpu": False, "max_failures": 0, "start_timeout_seconds": 60},
    }
    for name, section in sections.items():
        document[name] = section if name == "loss" else {**document.get(name, {}), **section}
    return document


def write_recipe(path: Path, model: Path | str, storage: Path | str, /, **sections: dict[str, Any]) -> Path:
    """Write `recipe` as a YAML file."""
    path.write_text(yaml.safe_dump(recipe(model, storage, **sections), sort_keys=False), encoding="utf-8")
    return path
