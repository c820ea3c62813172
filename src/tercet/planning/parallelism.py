"""Pure: how a recipe's parallelism is said to DeepSpeed and to PyTorch's FSDP2. Derived, never hand-written.

`workers.deepspeed` is laid over it by DeepSpeed's own names. What follows from the rest of the recipe (batch sizes,
accumulation, clipping, the ZeRO stage, precision, the optimizer) cannot be set there: the two would drift apart.
"""

from __future__ import annotations

from tercet.config.recipe import Config
from tercet.config.sections import Parallelism, WorkersConfig
from tercet.errors import PlanError
from tercet.planning.estimates import SHARE_OF_MEMORY, _is_16_bit, fits, memory_of, size_text
from tercet.planning.model_files import ModelFacts

ZERO_STAGES: dict[Parallelism, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def is_zero(parallelism: Parallelism) -> bool:
    """DeepSpeed runs it."""
    return parallelism in ZERO_STAGES


def shards_weights(parallelism: Parallelism) -> bool:
    """No rank holds the whole model: a forward pass is a collective of all ranks."""
    return parallelism in ("zero3", "zero3_offload", "fsdp2")


def choose(
    config: Config, facts: ModelFacts | None, num_tokens: float, memory_bytes_available: int | None
) -> tuple[Parallelism, str]:
    """The parallelism of a run, and why. A mode that the recipe names is never overruled; `auto` is the one that
    communicates least of those that fit.

    Raises PlanError when the memory is known and none fits."""
    workers = config.workers
    if workers.parallelism != "auto":
        alone = workers.num_workers == 1 and workers.parallelism in ("zero1", "zero2", "zero3")
        return workers.parallelism, "as the recipe says" + ("; with one worker nothing is sharded" if alone else "")
    unused = "; workers.deepspeed is not used" if workers.deepspeed else ""
    if facts is None:
        return "ddp", (
            "auto: how much memory the model needs is not known before its files are on this machine; "
            f"to choose another, name it in workers.parallelism{unused}"
        )
    if memory_bytes_available is None:
        return "ddp", (
            "auto: the memory of a worker is not known; "
            f"tell it with workers.memory_gib_per_worker, or name a mode in workers.parallelism{unused}"
        )
    has = size_text(memory_bytes_available)
    too_large: list[str] = []
    for parallelism in _candidates(workers):
        memory = memory_of(
            facts,
            parallelism,
            workers.num_workers,
            num_tokens,
            config.training,
            config.model.lora,
            config.loss.is_cached,
        )
        needed = size_text(memory.needed_bytes(workers))
        if not fits(memory, workers, memory_bytes_available):
            too_large.append(f"{parallelism} {needed}")
        elif parallelism == "ddp":
            return "ddp", f"auto: it fits, with {has} a worker, and nothing is faster{unused}"
        else:
            return parallelism, (
                f"auto: of the {has} a worker has, {SHARE_OF_MEMORY:.0%} is planned for: {', '.join(too_large)} would "
                f"be too much; {parallelism} needs {needed}{_price(parallelism, workers)}"
            )
    raise PlanError(
        f"the model fits no worker: of {has}, {SHARE_OF_MEMORY:.0%} is planned for, and a worker would need "
        f"{', '.join(too_large)}; its activations alone are {size_text(memory.activations_bytes)}",
        hint=_what_helps(config),
    )


def _candidates(workers: WorkersConfig) -> list[Parallelism]:
    """From the least communication to the least memory. For a CPU worker there is no other memory to offload to."""
    sharded: list[Parallelism] = ["zero2", "zero3"] if workers.num_workers > 1 else []
    offload: list[Parallelism] = [] if workers.use_gpu is False else ["zero3_offload"]
    return ["ddp", *sharded, *offload]


def _price(parallelism: Parallelism, workers: WorkersConfig) -> str:
    """ZeRO, section 7: stages 1 and 2 send what data parallelism sends, stage 3 half as much again."""
    if parallelism == "zero2":
        return " and communicates as much as ddp"
    if parallelism == "zero3":
        return " and communicates 1.5 times as much as ddp"
    much = "" if workers.num_workers == 1 else ", communicates 1.5 times as much as ddp,"
    return f"{much} and moves weights to and from host memory at every step"


def _what_helps(config: Config) -> str:
    training, workers = config.training, config.workers
    rows = training.global_batch_size // (workers.num_workers * training.gradient_accumulation_steps)
    ways = {
        "more workers": True,
        "smaller micro-batches (raise training.gradient_accumulation_steps)": rows > 1,
        "training.gradient_checkpointing: true": not training.gradient_checkpointing,
        "training.precision: bf16": not _is_16_bit(training),
        "model.lora": config.model.lora is None,
    }
    return "what would help: " + ", ".join(way for way, is_open in ways.items() if is_open)
