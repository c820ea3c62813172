"""Pure: why a recipe cannot work on this data or these workers, as pairs of problem and hint."""

from __future__ import annotations

from tercet.config.recipe import Config, world_sizes
from tercet.config.sections import Parallelism
from tercet.data.manifest import Manifest
from tercet.data.order import num_steps_per_epoch
from tercet.planning.dataset_plan import PlannedDataset
from tercet.planning.engine_settings import fp16_problems, override_problems
from tercet.planning.parallelism import shards_weights


def data_problems(config: Config, manifest: Manifest) -> list[tuple[str, str]]:
    """Return problems of the version to measure on, and of the global batch and the numbers of workers."""
    training, workers = config.training, config.workers
    problems = []
    if not world_sizes(config):
        num_micro_batches = (workers.min or workers.num_workers) * training.num_micro_batches
        nearest = max(round(training.global_batch_size / num_micro_batches), 1) * num_micro_batches
        count = workers.num_workers if workers.min is None else f"any of {workers.min} to {workers.max}"
        problems.append(
            (
                f"training.global_batch_size={training.global_batch_size} cannot be shared by "
                f"{count} workers × {training.num_micro_batches} accumulation steps",  # noqa: RUF001
                f"make it a multiple of {num_micro_batches}, such as {nearest}",
            )
        )
    for split in ("eval", "test"):
        if manifest.num_rows[split] == 0:
            problems.append(
                (
                    f"dataset {manifest.dataset} version {manifest.version} has no {split} rows, "
                    "so the evaluation would prove nothing",
                    "add rows with other groups: a hash of the group chooses the split",
                )
            )
    has_negative = any(column.startswith("negative") for column in manifest.text_columns)
    if config.loss.compares_rows and not has_negative and training.global_batch_size == training.num_micro_batches > 1:
        problems.append(
            (
                f"each of the {training.num_micro_batches} micro-batches has one row, and {config.loss.name} compares "
                "the rows of a micro-batch with each other: without negatives, the loss would be 0 in every step",
                "lower training.gradient_accumulation_steps, or raise training.global_batch_size",
            )
        )
    if config.evaluation.metric == "triplet_accuracy" and not has_negative:
        problems.append(
            (
                "evaluation.metric=triplet_accuracy needs a column `negative`; "
                f"{manifest.dataset} {manifest.version} has {', '.join(manifest.text_columns)}",
                "shard the data with --negative, or choose a metric that works on pairs",
            )
        )
    return problems


def loss_problems(config: Config, parallelism: Parallelism) -> list[tuple[str, str]]:
    """Return problems of the loss with the parallelism that was chosen."""
    num_tokens = getattr(config.loss, "mini_batch_num_tokens", None)
    most_workers = (world_sizes(config) or (config.workers.num_workers,))[-1]
    if num_tokens is None or most_workers == 1 or not shards_weights(parallelism):
        return []
    return [
        (
            f"loss.mini_batch_num_tokens={num_tokens} cannot be used with {parallelism} on several workers: each "
            "mini-batch gathers the weights on all ranks, and ranks would have unequal numbers of mini-batches",
            "set loss.mini_batch_size instead, or workers.parallelism to ddp, zero1 or zero2",
        )
    ]


def worker_problems(config: Config) -> list[tuple[str, str]]:
    """Return problems of the workers section, with the rest of the recipe."""
    training, workers = config.training, config.workers
    problems = override_problems(workers.deepspeed)
    if workers.deepspeed and workers.parallelism in ("ddp", "fsdp2"):
        problems.append(
            (
                f"workers.deepspeed is given, but workers.parallelism={workers.parallelism} does not use DeepSpeed",
                "remove workers.deepspeed, or choose zero1, zero2, zero3 or zero3_offload",
            )
        )
    if workers.parallelism == "fsdp2" and workers.num_workers == 1:
        problems.append(
            (
                "workers.parallelism=fsdp2 needs more than one worker: transformers refuses FSDP in a single process",
                "raise workers.num_workers, or choose ddp, or zero3_offload if the model does not fit",
            )
        )
    problems += fp16_problems(training.precision, workers.parallelism)
    if training.precision in ("tf32", "fp16") and workers.use_gpu is False:
        problems.append(
            (
                f"training.precision={training.precision} needs a GPU, but workers.use_gpu is false",
                "choose fp32 or bf16",
            )
        )
    return problems


def accumulation_problems(config: Config) -> list[tuple[str, str]]:
    """Return problems of `training.gradient_accumulation_steps: auto`."""
    if config.training.gradient_accumulation_steps != "auto":
        return []
    if config.workers.try_longest_batch is False:
        return [
            (
                "training.gradient_accumulation_steps: auto is decided by the trial of the longest micro-batch, which "
                "workers.try_longest_batch: false switches off",
                "remove workers.try_longest_batch, or name the number of accumulation steps",
            )
        ]
    if not config.loss.compares_rows:
        return []
    return [
        (
            f"training.gradient_accumulation_steps: auto cannot be used with {config.loss.name}, which compares the "
            "rows of a micro-batch with each other: smaller micro-batches would make it another loss",
            "name the number, or choose a Cached… loss, whose memory does not grow with the batch",
        )
    ]


def dataset_problems(config: Config, dataset: PlannedDataset) -> list[tuple[str, str]]:
    """Return problems of a dataset to train on."""
    problems = []
    batch_size = config.training.global_batch_size
    keeps_last = config.training.last_batch == "keep"
    num_batches = num_steps_per_epoch(dataset.num_train_rows, batch_size, keeps_last=keeps_last)
    if num_batches == 0:
        problems.append(
            (
                f"{dataset.num_train_rows} train rows of {dataset.name} do not fill one global batch of {batch_size}",
                "lower training.global_batch_size, or add rows",
            )
        )
    elif dataset.steps_per_epoch == 0:
        problems.append(
            (
                f"with weight {dataset.weight:g}, {dataset.name} contributes no batch to an epoch: "
                f"its train rows make {num_batches} global batches",
                f"raise the weight to {1 / num_batches:.2g} or more",
            )
        )
    column_problem = config.loss.column_problem(dataset.columns)
    if column_problem is not None:
        need, hint = column_problem
        has = f"{dataset.name} {dataset.version} has {', '.join(dataset.columns)}"
        problems.append((f"loss.name={config.loss.name} {need}; {has}", hint))
    return problems
