"""Pure: estimates of a worker's memory while it trains, part by part, of tokens and of the training time.

ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054. Activations: Korthikanti et al. 2022, arXiv 2205.05198. The copies that
torch 2.13 and DeepSpeed 0.19 keep are taken from their sources; docs/parallelism.md has the table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tercet.config.recipe import Config, rows_per_rank_and_micro_batch
from tercet.config.sections import LoraConfig, Parallelism, TrainingConfig, WorkersConfig
from tercet.data.manifest import Manifest
from tercet.planning.model_files import ModelFacts
from tercet.planning.packing import NUM_CHUNKS, Packing
from tercet.storage.documents import Frozen

# Weights and gradients are fp32 in every mode; Adam keeps two fp32 moments (ZeRO, section 3.1).
WEIGHT_BYTES = GRADIENT_BYTES = 4
ADAM_BYTES = 8
# Under autocast, a matrix product keeps a 16-bit copy of its weight for the backward pass.
AUTOCAST_COPY_BYTES = 2
# Activations of a layer per token and hidden unit, without the attention term. Counted on all-MiniLM-L6-v2 (torch 2.13,
# docs/parallelism.md). Korthikanti's equation 2 has 34 and 68: it omits what autocast keeps in fp32.
ACTIVATION_BYTES_16_BIT, ACTIVATION_BYTES_32_BIT = 51, 74
# The input of a layer, which is all that gradient checkpointing keeps of it (Korthikanti, section 5). Counted in the
# same way: the residual stream stays fp32 under autocast.
LAYER_INPUT_BYTES = 4
# Attention weights and their dropout masks, for each head and pair of tokens. GroupedAttention keeps one number of the
# activations' type for each (grouped_attention.py); torch's own attention on a CPU kept 12 bytes (counted as above).
# Attention kernels on a GPU that compute the weights again keep none.
GROUPED_BYTES_16_BIT, GROUPED_BYTES_32_BIT, PADDED_CPU_BYTES = 4, 8, 12
# A GPU holds the CUDA context, the libraries' workspaces and NCCL's buffers beside the tensors. Estimated: 0.5 to 1 GiB
# for the first two, and 4 MiB for each of NCCL's channels and peers. Not measured by tercet.
GPU_OVERHEAD_BYTES = 3 * 2**29
# DeepSpeed allocates its communication bucket (`reduce_bucket_size`) as a whole: the default of 5e8 would be 1.9 GiB in
# fp32 even for the smallest model. There are two if communication overlaps the backward pass.
BUCKET_ELEMENTS = 25_000_000
# The share of a worker's memory that a plan may use; the rest is for what the estimate omits (docs/parallelism.md,
# Limits).
SHARE_OF_MEMORY = 0.9


def size_text(num_bytes: float) -> str:
    """Return a size in words, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


class Memory(Frozen):
    """Estimated peak memory of one worker, on its device and in host memory."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    overhead_bytes: int = 0
    """See Kept."""
    host_bytes: int = 0
    """Offloaded weights and optimizer state; 0 without offloading."""

    @property
    def total_bytes(self) -> int:
        """Bytes on the device."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.activations_bytes + self.overhead_bytes

    def needed_bytes(self, workers: WorkersConfig) -> int:
        """Return the bytes to compare with a worker's memory; for CPU workers, device and host memory are one."""
        return self.total_bytes + (self.host_bytes if workers.use_gpu is False else 0)

    def text(self) -> str:
        """Return the parts and their sum as one line."""
        parts = {
            "weights": self.weights_bytes,
            "gradients": self.gradients_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.activations_bytes,
            **({"CUDA": self.overhead_bytes} if self.overhead_bytes else {}),
        }
        shown = " + ".join(f"{name} {size_text(num_bytes)}" for name, num_bytes in parts.items())
        host = f"; host memory {size_text(self.host_bytes)}" if self.host_bytes else ""
        return f"{shown} = about {size_text(self.total_bytes)} a worker{host}"


def num_trainable_parameters(facts: ModelFacts, lora: LoraConfig | None) -> int:
    """Return the number of trained parameters: all, or with LoRA rank * (inputs + outputs) for each adapted layer.

    `all-linear` assumes the layers of BERT: four linear layers h → h, and the two of a feed-forward network of width
    4 h; together 4 * 2 h + 2 * 5 h = 18 h. A named layer is assumed to be h → h, and to be in each layer once."""
    if lora is None:
        return facts.num_parameters
    inputs_and_outputs = 18 if lora.target_modules == "all-linear" else 2 * len(lora.target_modules)
    return lora.rank * inputs_and_outputs * facts.hidden_size * facts.num_layers


def checkpoint_bytes(facts: ModelFacts, lora: LoraConfig | None) -> int:
    """Return the size of a checkpoint: all weights, and Adam's two moments of the trained ones."""
    return WEIGHT_BYTES * facts.num_parameters + ADAM_BYTES * num_trainable_parameters(facts, lora)


class Kept(NamedTuple):
    """What a worker keeps at a time for a backward pass, and beside all tensors."""

    num_tokens: float
    """Tokens whose activations are kept."""
    attention_bytes: float = 0.0
    """Attention weights and their dropout masks, for one head of one layer."""
    num_passes: int = 1
    """Forward passes, each of which keeps 16-bit copies of the weights of its own."""
    overhead_bytes: int = 0
    """CUDA context and the libraries' buffers; 0 on a CPU."""


def memory_of(
    facts: ModelFacts,
    parallelism: Parallelism,
    num_workers: int,
    kept: Kept,
    training: TrainingConfig | None = None,
    lora: LoraConfig | None = None,
    loss_is_cached: bool = False,
) -> Memory:
    """Estimate the memory of one of `num_workers` workers."""
    training = training or TrainingConfig()
    trained = num_trainable_parameters(facts, lora)
    total = facts.num_parameters + (trained if lora else 0)
    weights, gradients, optimizer = WEIGHT_BYTES * total, GRADIENT_BYTES * trained, ADAM_BYTES * trained
    # ZeRO-3 and FSDP2 gather one unit at a time: a layer, or the embeddings if they are larger.
    layer = math.ceil((facts.num_parameters - facts.num_embedding_parameters) / max(facts.num_layers, 1))
    unit = max(layer, facts.num_embedding_parameters)
    trained_of_unit = unit if lora is None else math.ceil(trained / max(facts.num_layers, 1))
    buckets = GRADIENT_BYTES * BUCKET_ELEMENTS
    host = 0

    def shard(num_bytes: float) -> float:
        return num_bytes / num_workers

    # Gradients are not sharded while they accumulate: under DeepSpeed over the backward passes of a cached loss (see
    # deepspeed_engine.py), under FSDP2 over the accumulation steps (accelerate reduces them in the last).
    match parallelism:
        case "ddp":  # gradients are views of the buckets that are sent
            pass
        case "zero1" | "zero2":
            # DeepSpeed updates a copy of its shard of the weights, even if they are fp32 already.
            weights += math.ceil(shard(WEIGHT_BYTES * trained))
            whole = parallelism == "zero1" or loss_is_cached
            gradients = 2 * buckets + (gradients if whole else math.ceil(shard(gradients)))
            optimizer = math.ceil(shard(optimizer))
        case "zero3" | "fsdp2":
            weights = math.ceil(shard(weights)) + WEIGHT_BYTES * unit
            whole = training.num_micro_batches > 1 if parallelism == "fsdp2" else loss_is_cached
            gradients = math.ceil(shard(gradients)) + (gradients if whole else GRADIENT_BYTES * trained_of_unit)
            gradients += buckets if parallelism == "zero3" else 0
            optimizer = math.ceil(shard(optimizer))
        case "zero3_offload":
            # Host memory holds the weights and, for each trained weight, the copy that DeepSpeed updates, two gradient
            # buffers (one to reduce, one that Adam reads) and the moments.
            copies = (WEIGHT_BYTES + 2 * GRADIENT_BYTES + ADAM_BYTES) * trained
            host = math.ceil(shard(weights + copies))
            gradients = buckets + (gradients if loss_is_cached else GRADIENT_BYTES * trained_of_unit)
            weights, optimizer = WEIGHT_BYTES * unit, 0
    if is_16_bit(training) and parallelism in ("ddp", "zero1", "zero2"):
        # The sharded modes gather a unit in 16 bits, and free it. Autocast caches copies of trained weights but not of
        # frozen ones, so that with gradient checkpointing only one layer's copies remain.
        # Each forward pass casts again. With gradient checkpointing, the copies of one pass are freed at its end.
        one_layer = lora is not None and training.gradient_checkpointing
        copied = layer if one_layer else facts.num_parameters - facts.num_embedding_parameters
        weights += AUTOCAST_COPY_BYTES * copied * (1 if training.gradient_checkpointing else kept.num_passes)
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=_activations_bytes(facts, kept, training),
        overhead_bytes=kept.overhead_bytes,
        host_bytes=host,
    )


def with_likely_precision(config: Config) -> Config:
    """Return the recipe with the precision to estimate for, where it names none: bf16 on GPUs, fp32 elsewhere."""
    if config.training.precision is not None or config.workers.use_gpu is not True:
        return config
    training = config.training.model_copy(update={"precision": "bf16"})
    return config.model_copy(update={"training": training})


def is_16_bit(training: TrainingConfig) -> bool:
    """Return whether the recipe asks for a 16-bit precision."""
    return training.precision in ("bf16", "fp16")


def _activations_bytes(facts: ModelFacts, kept: Kept, training: TrainingConfig) -> int:
    each = ACTIVATION_BYTES_16_BIT if is_16_bit(training) else ACTIVATION_BYTES_32_BIT
    elements, attention = kept.num_tokens * facts.hidden_size, kept.attention_bytes * facts.num_heads
    if training.gradient_checkpointing:
        return math.ceil(elements * (LAYER_INPUT_BYTES * facts.num_layers + each) + attention)
    return math.ceil((elements * each + attention) * facts.num_layers)


def available_bytes(workers: WorkersConfig, share_of_this_machine: int | None, gpu_bytes: int | None) -> int | None:
    """Return the memory of one worker: from the recipe, else a CPU worker's share of this machine or a GPU's memory.

    None where neither is known, and with `use_gpu: auto` where there is no GPU to ask."""
    if workers.memory_gib_per_worker is not None:
        return int(workers.memory_gib_per_worker * 2**30)
    return share_of_this_machine if workers.use_gpu is False else gpu_bytes


def fits(memory: Memory, workers: WorkersConfig, memory_bytes_available: int) -> bool:
    """Return whether the memory is within the share that a plan may use."""
    return memory.needed_bytes(workers) <= SHARE_OF_MEMORY * memory_bytes_available


# English text has about four characters per token of a WordPiece vocabulary.
CHARACTERS_PER_TOKEN = 4.0

# Rough floating-point operations per second on real tokens, for fp32 on one core: each of the demo's two workers did
# 24e9 at best (docs/log.md, 0.56 steps/s of 32 rows). GPUs differ a hundredfold, so there is no estimate for them.
CPU_FLOPS_PER_CORE = 30e9


def tokens_per_text(config: Config, manifest: Manifest, facts: ModelFacts | None) -> list[float]:
    """Return the mean number of tokens per text for each column, without padding, with two special tokens."""
    limit = config.model.max_seq_length or (facts.max_seq_length if facts else None) or 512
    means = [manifest.text_statistics[column].mean_chars / CHARACTERS_PER_TOKEN + 2 for column in manifest.text_columns]
    return [min(mean, limit) for mean in means]


def kept_for_backward(config: Config, manifest: Manifest, facts: ModelFacts | None, packing: Packing) -> Kept:
    """Return what a worker keeps at a time for a backward pass: of a micro-batch, or a mini-batch of a cached loss."""
    rows = rows_per_rank_and_micro_batch(config)
    means = tokens_per_text(config, manifest, facts)
    num_tokens = rows * sum(means)
    if config.loss.is_cached:
        num_texts = min(getattr(config.loss, "mini_batch_size", rows), rows)
        limit = getattr(config.loss, "mini_batch_num_tokens", None) or num_texts * max(means)
        num_tokens = min(limit, num_tokens)
    num_passes = 1
    if not config.loss.is_cached and packing != "packed":
        num_passes = NUM_CHUNKS if packing == "chunked" else len(means)
    return Kept(num_tokens, _attention_bytes(config, manifest, means, num_tokens, packing), num_passes)


def _attention_bytes(
    config: Config, manifest: Manifest, means: list[float], num_tokens: float, packing: Packing
) -> float:
    """Estimate the bytes of attention weights and masks that one head of one layer keeps."""
    if packing == "packed":
        each = GROUPED_BYTES_16_BIT if is_16_bit(config.training) else GROUPED_BYTES_32_BIT
    elif config.workers.use_gpu is False:
        each = PADDED_CPU_BYTES
    else:
        return 0.0
    # Lengths vary: the square of one that is distributed exponentially is twice the squared mean, on average.
    longest = [
        manifest.text_statistics[column].max_chars / CHARACTERS_PER_TOKEN + 2 for column in manifest.text_columns
    ]
    pairs = sum(mean * min(2 * mean, most) for mean, most in zip(means, longest, strict=True))
    return each * pairs * num_tokens / sum(means)


def training_seconds(config: Config, facts: ModelFacts | None, num_tokens: float) -> float | None:
    """Estimate the seconds to train on `num_tokens` tokens; None for GPUs, or if the model is unknown.

    Six floating-point operations per token and parameter (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
    if facts is None or config.workers.use_gpu is True:
        return None
    flops = 6.0 * (facts.num_parameters - facts.num_embedding_parameters) * num_tokens
    return flops / (CPU_FLOPS_PER_CORE * config.workers.num_workers * config.workers.cpus_per_worker)
