"""Pure: choose the parallelism that fits into memory, and say why."""

from __future__ import annotations

from tercet.config.recipe import Config
from tercet.config.sections import Parallelism, WorkersConfig
from tercet.errors import PlanError
from tercet.planning.estimates import SHARE_OF_MEMORY, Kept, fits, is_16_bit, memory_of, size_text
from tercet.planning.model_files import ModelFacts

ZERO_STAGES: dict[Parallelism, int] = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def is_zero(parallelism: Parallelism) -> bool:
    """Return whether DeepSpeed runs this mode."""
    return parallelism in ZERO_STAGES


def shards_weights(parallelism: Parallelism) -> bool:
    """Return whether no rank holds the whole model, so that a forward pass is a collective of all ranks."""
    return parallelism in ("zero3", "zero3_offload", "fsdp2")


def choose(
    config: Config, facts: ModelFacts | None, kept: Kept, memory_bytes_available: int | None
) -> tuple[Parallelism, str]:
    """Return the parallelism of a run, and the reason. A mode named in the recipe is always used; for `auto`, the mode
    with the least communication among those that fit.

    memory_bytes_available: of one worker, None when unknown.
    Raises PlanError if the memory is known and no mode fits."""
    workers = config.workers
    if workers.parallelism != "auto":
        alone = workers.num_workers == 1 and workers.parallelism in ("zero1", "zero2", "zero3")
        return workers.parallelism, "as the recipe says" + ("; with one worker nothing is sharded" if alone else "")
    unused = "; workers.deepspeed is not used" if workers.deepspeed else ""
    if config.training.precision == "fp16" and (facts is None or memory_bytes_available is None):
        return "ddp", f"auto: training.precision=fp16 works with no other mode{unused}"
    if facts is None:
        return "ddp", (
            "auto: the memory that the model needs is unknown until its files are on this machine; "
            f"to use another mode, set workers.parallelism{unused}"
        )
    if memory_bytes_available is None:
        return "ddp", (
            "auto: the memory of a worker is unknown; "
            f"set workers.memory_gib_per_worker, or a mode in workers.parallelism{unused}"
        )
    has = size_text(memory_bytes_available)
    too_large: list[str] = []
    for parallelism in _candidates(config):
        memory = memory_of(
            facts,
            parallelism,
            workers.num_workers,
            kept,
            config.training,
            config.model.lora,
            config.loss.is_cached,
        )
        needed = size_text(memory.needed_bytes(workers))
        if not fits(memory, workers, memory_bytes_available):
            too_large.append(f"{parallelism} {needed}")
        elif parallelism == "ddp":
            return "ddp", f"auto: it fits into the {has} of a worker, and no mode is faster{unused}"
        else:
            return parallelism, (
                f"auto: a worker may use {SHARE_OF_MEMORY:.0%} of its {has}; {', '.join(too_large)} would be too much; "
                f"{parallelism} needs {needed}{_price(parallelism, workers)}"
            )
    raise PlanError(
        f"the model does not fit into a worker, which may use {SHARE_OF_MEMORY:.0%} of its {has} and would need "
        f"{', '.join(too_large)}; activations alone need {size_text(memory.activations_bytes)}",
        hint=_what_helps(config),
    )


def _candidates(config: Config) -> list[Parallelism]:
    """Return modes from the least communication to the least memory. A CPU worker has no other memory to offload to,
    and fp16 works with ddp only."""
    workers = config.workers
    if config.training.precision == "fp16":
        return ["ddp"]
    sharded: list[Parallelism] = ["zero2", "zero3"] if workers.num_workers > 1 else []
    offload: list[Parallelism] = [] if workers.use_gpu is False else ["zero3_offload"]
    return ["ddp", *sharded, *offload]


def _price(parallelism: Parallelism, workers: WorkersConfig) -> str:
    """Return the price of a mode in words. ZeRO, section 7: stages 1 and 2 send as much as data parallelism, stage 3
    half as much again."""
    if parallelism == "zero2":
        return " and communicates as much as ddp"
    if parallelism == "zero3":
        return " and communicates 1.5 times as much as ddp"
    much = "" if workers.num_workers == 1 else ", communicates 1.5 times as much as ddp,"
    return f"{much} and moves weights to and from host memory at every step"


def _what_helps(config: Config) -> str:
    training, workers = config.training, config.workers
    rows = training.global_batch_size // (workers.num_workers * training.num_micro_batches)
    ways = {
        "more workers": True,
        "smaller micro-batches (raise training.gradient_accumulation_steps)": rows > 1,
        "training.gradient_checkpointing: true": not training.gradient_checkpointing,
        "training.precision: bf16": not is_16_bit(training),
        "training.precision: bf16, which every mode can use": training.precision == "fp16",
        "model.lora": config.model.lora is None,
    }
    return "any of these helps: " + ", ".join(way for way, is_open in ways.items() if is_open)
