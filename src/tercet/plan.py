"""Pure: recipe and what storage holds → `TrainPlan`. Wrong combinations die here, before a GPU is asked for."""

from __future__ import annotations

import datetime
import math

from pydantic import BaseModel, ConfigDict

from tercet.config import Config
from tercet.errors import PlanError
from tercet.loss_config import TripletLossConfig
from tercet.manifest import Manifest
from tercet.model_source import ModelFacts
from tercet.sampling import num_steps_per_epoch

# fp32 weights, their gradients, and Adam's two moments: Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054, section 3.
BYTES_PER_PARAMETER = 16
# Activations of a layer in 16 bits are about 34 bytes a token and hidden unit: Korthikanti et al. 2022, arXiv
# 2205.05198, equation 2, without the attention term, which is small for short texts. fp32 doubles it.
ACTIVATION_BYTES = 2 * 34
# English text: about four characters a token for WordPiece vocabularies.
CHARACTERS_PER_TOKEN = 4.0
# Floating-point operations a second on real tokens, roughly, for fp32 on one core: the demo's two workers did 24e9
# each at their best (docs/log.md, 0.56 steps/s of 32 rows). A GPU's rate differs a hundredfold between models, so no
# time is given for one.
CPU_FLOPS_PER_CORE = 30e9


class TrainPlan(BaseModel):
    """Everything derived, and frozen: what the workers get. Counts are of rows, steps or texts as named."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    config: Config
    dataset_version: str
    columns: tuple[str, ...]
    num_rows: dict[str, int]
    num_train_rows: int
    """Rows of the train split that take part (see training.max_train_rows)."""
    num_dropped_rows: int
    """Rows an epoch leaves out because they do not fill a global batch; other ones in each epoch."""
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    rows_per_rank_and_micro_batch: int
    evaluation_steps: tuple[int, ...]
    """Optimizer steps after which the eval split is measured and a checkpoint written; 0 is the baseline."""
    checkpoint_bytes: int | None
    memory_bytes_per_worker: int | None
    training_seconds: float | None

    @property
    def metric(self) -> str:
        """What best means."""
        return self.config.evaluation.metric


def make_run_id(config: Config, dataset_version: str, today: datetime.date) -> str:
    """The same recipe on the same data on the same UTC day is the same run: submitting it again resumes."""
    return f"{today:%Y%m%d}-{config.name}-{config.experiment_hash()}-{dataset_version[:8]}"


def make_plan(
    config: Config, manifest: Manifest, facts: ModelFacts | None, today: datetime.date, run_id: str | None = None
) -> TrainPlan:
    """Derive everything. Raises PlanError naming every combination that cannot work."""
    training, workers = config.training, config.workers
    num_rows = {split: manifest.num_rows[split] for split in ("train", "eval", "test")}
    num_train_rows = min(num_rows["train"], training.max_train_rows or num_rows["train"])
    steps_per_epoch = num_steps_per_epoch(num_train_rows, training.global_batch_size)
    problems = _problems(config, manifest, num_rows, num_train_rows, steps_per_epoch)
    if problems:
        raise PlanError("\n".join(problem for problem, _ in problems), hint="; ".join(hint for _, hint in problems))

    num_micro_batches = workers.num_workers * training.gradient_accumulation_steps
    num_steps = steps_per_epoch * training.num_epochs
    rows_per_micro_batch = training.global_batch_size // num_micro_batches
    columns = manifest.text_columns
    tokens_per_row = _tokens_per_row(config, manifest, columns, facts)
    return TrainPlan(
        run_id=run_id or make_run_id(config, manifest.version, today),
        config=config,
        dataset_version=manifest.version,
        columns=columns,
        num_rows=num_rows,
        num_train_rows=num_train_rows,
        num_dropped_rows=num_train_rows - steps_per_epoch * training.global_batch_size,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=math.ceil(training.warmup_ratio * num_steps),
        rows_per_rank_and_micro_batch=rows_per_micro_batch,
        evaluation_steps=tuple(range(0, num_steps + 1, steps_per_epoch)),
        # Weights and Adam's two moments, in fp32.
        checkpoint_bytes=None if facts is None else 12 * facts.num_parameters,
        memory_bytes_per_worker=None if facts is None else _memory_bytes(facts, rows_per_micro_batch * tokens_per_row),
        training_seconds=_training_seconds(config, facts, num_steps * training.global_batch_size * tokens_per_row),
    )


def _problems(
    config: Config, manifest: Manifest, num_rows: dict[str, int], num_train_rows: int, steps_per_epoch: int
) -> list[tuple[str, str]]:
    training, workers = config.training, config.workers
    found = []
    num_micro_batches = workers.num_workers * training.gradient_accumulation_steps
    if training.global_batch_size % num_micro_batches:
        nearest = max(round(training.global_batch_size / num_micro_batches), 1) * num_micro_batches
        found.append(
            (
                f"training.global_batch_size={training.global_batch_size} cannot be shared by "
                f"{workers.num_workers} workers × {training.gradient_accumulation_steps} accumulation steps",  # noqa: RUF001
                f"make it a multiple of {num_micro_batches}, such as {nearest}",
            )
        )
    if steps_per_epoch == 0:
        found.append(
            (
                f"{num_train_rows} train rows do not fill one global batch of {training.global_batch_size}",
                "lower training.global_batch_size or add rows",
            )
        )
    for split in ("eval", "test"):
        if num_rows[split] == 0:
            found.append(
                (
                    f"dataset {manifest.dataset} version {manifest.version} has no {split} rows, "
                    "so nothing could be proven",
                    "add rows with other groups: a split is chosen by a hash of the group",
                )
            )
    needs_negative = {
        f"loss.name={config.loss.name}": isinstance(config.loss, TripletLossConfig),
        "evaluation.metric=triplet_accuracy": config.evaluation.metric == "triplet_accuracy",
    }
    found += [
        (
            f"{setting} needs a column `negative`; version {manifest.version} has {', '.join(manifest.text_columns)}",
            "shard the data with --negative, or choose one that works on pairs",
        )
        for setting, needed in needs_negative.items()
        if needed and "negative" not in manifest.text_columns
    ]
    return found


def _tokens_per_row(config: Config, manifest: Manifest, columns: tuple[str, ...], facts: ModelFacts | None) -> float:
    """Mean tokens of one row over all its columns, padding not counted; two special tokens a text."""
    limit = config.model.max_seq_length or (facts.max_seq_length if facts else None) or 512
    means = [manifest.text_statistics[column].mean_chars / CHARACTERS_PER_TOKEN + 2 for column in columns]
    return sum(min(mean, limit) for mean in means)


def _memory_bytes(facts: ModelFacts, tokens_per_micro_batch: float) -> int:
    activations = tokens_per_micro_batch * facts.num_layers * facts.hidden_size * ACTIVATION_BYTES
    return int(BYTES_PER_PARAMETER * facts.num_parameters + activations)


def _training_seconds(config: Config, facts: ModelFacts | None, num_tokens: float) -> float | None:
    """Six multiply-adds a token and parameter (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); CPU workers only."""
    if facts is None or config.workers.use_gpu is True:
        return None
    flops = 6.0 * (facts.num_parameters - facts.num_embedding_parameters) * num_tokens
    return flops / (CPU_FLOPS_PER_CORE * config.workers.num_workers * config.workers.cpus_per_worker)
