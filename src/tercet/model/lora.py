"""LoRA by peft: small trained matrices beside frozen weights; the published model is merged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from tercet.config.sections import LoraConfig
from tercet.errors import ConfigError, CorruptObject

# In a checkpoint: every trained weight by its name, for resuming. The merged model could not be taken apart again.
TRAINED_WEIGHTS = "trained_weights.safetensors"
# In a checkpoint and in the published model: the adapter alone, as peft loads it.
ADAPTER_FOLDER = "adapter"


def add_adapter(model: SentenceTransformer, config: LoraConfig) -> None:
    """Freeze the encoder and put an adapter beside its linear layers. Modules after the encoder (Dense) are trained
    whole. Raises ConfigError when a target does not exist."""
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hint = f"the model's linear layers are {', '.join(sorted(linear))}"
    # peft is content when one of several names is found.
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
                exclude_modules=r".*\bpooler\b.*",
                bias="none",
            )
        )
    except ValueError as error:
        problem = f"model.lora.target_modules={config.target_modules}: {' '.join(str(error).split())}"
        raise ConfigError(problem, hint) from error


def save_merged(model: SentenceTransformer, folder: Path) -> None:
    """Write the adapter, the trained weights, and the model with the adapter merged into it. `model` is used up."""
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
    """Into the base model with a fresh adapter, what a checkpoint trained. Raises CorruptObject when names or shapes
    differ."""
    weights = load_file(folder / TRAINED_WEIGHTS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # copy_ would broadcast a rank of 1 into any other without an error.
    if {name: w.shape for name, w in weights.items()} != {name: p.shape for name, p in parameters.items()}:
        raise CorruptObject(
            f"{folder / TRAINED_WEIGHTS} does not hold the weights that this recipe trains",
            hint="was it another recipe?",
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
