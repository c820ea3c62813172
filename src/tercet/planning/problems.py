"""Pure: what keeps a recipe from working on this data or these workers. Each problem has a hint."""

from __future__ import annotations

from tercet.config.recipe import Config, world_sizes
from tercet.config.sections import Parallelism
from tercet.data.manifest import Manifest
from tercet.data.order import num_steps_per_epoch
from tercet.planning.dataset_plan import PlannedDataset
from tercet.planning.engine_settings import override_problems
from tercet.planning.parallelism import shards_weights


def data_problems(config: Config, manifest: Manifest) -> list[tuple[str, str]]:
    """What this version cannot give, or these numbers cannot share."""
    training, workers = config.training, config.workers
    found = []
    if not world_sizes(config):
        num_micro_batches = (workers.min or workers.num_workers) * training.gradient_accumulation_steps
        nearest = max(round(training.global_batch_size / num_micro_batches), 1) * num_micro_batches
        count = workers.num_workers if workers.min is None else f"any of {workers.min} to {workers.max}"
        found.append(
            (
                f"training.global_batch_size={training.global_batch_size} cannot be shared by "
                f"{count} workers × {training.gradient_accumulation_steps} accumulation steps",  # noqa: RUF001
                f"make it a multiple of {num_micro_batches}, such as {nearest}",
            )
        )
    for split in ("eval", "test"):
        if manifest.num_rows[split] == 0:
            found.append(
                (
                    f"dataset {manifest.dataset} version {manifest.version} has no {split} rows, "
                    "so nothing could be proven",
                    "add rows with other groups: a split is chosen by a hash of the group",
                )
            )
    has_negative = any(column.startswith("negative") for column in manifest.text_columns)
    if config.evaluation.metric == "triplet_accuracy" and not has_negative:
        found.append(
            (
                "evaluation.metric=triplet_accuracy needs a column `negative`; "
                f"{manifest.dataset} {manifest.version} has {', '.join(manifest.text_columns)}",
                "shard the data with --negative, or choose one that works on pairs",
            )
        )
    return found


def loss_problems(config: Config, parallelism: Parallelism) -> list[tuple[str, str]]:
    """What the loss cannot do in the parallelism that was chosen."""
    num_tokens = getattr(config.loss, "mini_batch_num_tokens", None)
    most_workers = (world_sizes(config) or (config.workers.num_workers,))[-1]
    if num_tokens is None or most_workers == 1 or not shards_weights(parallelism):
        return []
    return [
        (
            f"loss.mini_batch_num_tokens={num_tokens} does not go with {parallelism} on several workers: ranks would "
            "have unequal numbers of mini-batches, each of which gathers the weights",
            "take loss.mini_batch_size instead, or workers.parallelism ddp, zero1 or zero2",
        )
    ]


def worker_problems(config: Config) -> list[tuple[str, str]]:
    """What the workers, as the recipe asks for them, cannot do."""
    training, workers = config.training, config.workers
    found = override_problems(workers.deepspeed)
    if workers.deepspeed and workers.parallelism in ("ddp", "fsdp2"):
        found.append(
            (
                f"workers.deepspeed is given, but workers.parallelism={workers.parallelism} does not use DeepSpeed",
                "leave it away, or choose zero1, zero2, zero3 or zero3_offload",
            )
        )
    if workers.parallelism == "fsdp2" and workers.num_workers == 1:
        found.append(
            (
                "workers.parallelism=fsdp2 needs more than one worker: transformers refuses FSDP in a lone process",
                "raise workers.num_workers, or choose ddp, or zero3_offload where the model does not fit",
            )
        )
    if training.precision == "fp16" and workers.parallelism == "fsdp2":
        found.append(("training.precision=fp16 does not go with workers.parallelism=fsdp2", "choose bf16, or zero3"))
    if training.precision in ("tf32", "fp16") and workers.use_gpu is False:
        found.append(
            (
                f"training.precision={training.precision} needs a GPU, but workers.use_gpu is false",
                "choose fp32 or bf16",
            )
        )
    return found


def dataset_problems(config: Config, dataset: PlannedDataset) -> list[tuple[str, str]]:
    """What keeps it from being trained on: each problem with a hint."""
    found = []
    batch_size = config.training.global_batch_size
    num_batches = num_steps_per_epoch(dataset.num_train_rows, batch_size)
    if num_batches == 0:
        found.append(
            (
                f"{dataset.num_train_rows} train rows of {dataset.name} do not fill one global batch of {batch_size}",
                "lower training.global_batch_size or add rows",
            )
        )
    elif dataset.steps_per_epoch == 0:
        found.append(
            (
                f"the weight {dataset.weight:g} of {dataset.name}, which has {num_batches} global batches, "
                "gives no batch to an epoch",
                f"raise it to {1 / num_batches:.2g} or more",
            )
        )
    column_problem = config.loss.column_problem(dataset.columns)
    if column_problem is not None:
        need, hint = column_problem
        has = f"{dataset.name} {dataset.version} has {', '.join(dataset.columns)}"
        found.append((f"loss.name={config.loss.name} {need}; {has}", hint))
    return found
