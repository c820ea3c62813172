"""LoRA by peft: trains an adapter beside frozen weights, and merges it into the published model."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tercet.config.sections import LoraConfig
from tercet.errors import ConfigError, CorruptObject

# In a checkpoint: every trained weight by its name, to resume from. A merged adapter cannot be separated again.
TRAINED_WEIGHTS = "trained_weights.safetensors"
# In a checkpoint and in the published model: the adapter alone, as peft loads it.
ADAPTER_FOLDER = "adapter"
POOLER = r".*\bpooler\b.*"


def add_adapter(model: SentenceTransformer, config: LoraConfig) -> None:
    """Freeze the encoder and add an adapter beside its linear layers. Modules after the encoder (Dense) train whole.

    Raises ConfigError when a target module does not exist."""
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hint = f"the model's linear layers are {', '.join(sorted(linear))}"
    # peft accepts a list of which only one name exists.
    for target in [] if isinstance(targets, str) else targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ConfigError(f"model.lora.target_modules: the model has no `{target}`", hint)
    try:
        model.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                exclude_modules=POOLER
                if any(re.fullmatch(POOLER, name) for name, _ in model.named_modules())
                else None,
                bias="none",
            )
        )
    except ValueError as error:
        problem = f"model.lora.target_modules={config.target_modules}: {' '.join(str(error).split())}"
        raise ConfigError(problem, hint) from error


def save_merged(model: SentenceTransformer, folder: Path) -> None:
    """Write the adapter, the trained weights, and the model with the adapter merged. `model` is unusable afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    encoder = model.transformers_model
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / TRAINED_WEIGHTS)
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir(exist_ok=True)
    weights = get_peft_model_state_dict(encoder, adapter_name="default")
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    encoder.peft_config["default"].save_pretrained(str(adapter))
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent = encoder.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    encoder._hf_peft_config_loaded = False
    del encoder.peft_config
    model.save_pretrained(str(folder), create_model_card=False)


def load_trained(model: SentenceTransformer, folder: Path) -> None:
    """Load the trained weights of a checkpoint into the base model with a new adapter.

    Raises CorruptObject when names or shapes differ."""
    weights = load_file(folder / TRAINED_WEIGHTS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # copy_ would silently broadcast an adapter of rank 1 into one of any other rank.
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise CorruptObject(
            f"{folder / TRAINED_WEIGHTS} does not hold the weights that this recipe trains",
            hint="did the checkpoint come from another recipe?",
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
