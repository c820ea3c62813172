"""What a rank trains with, made from a plan: arguments, rows, model, loss, trainer, callbacks.

It imports torch and the libraries around it at the top. The worker imports it after it has set their environment.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import PrinterCallback, set_seed

from tercet.artifacts.throughput import Throughput
from tercet.artifacts.uploader import Uploader
from tercet.config.sections import ModelConfig
from tercet.data.cache import cache_dir_of
from tercet.data.order import RankBatches
from tercet.data.text_stats import estimated_tokens
from tercet.data.token_cache import has_tokens
from tercet.data.versions import read_manifest
from tercet.evaluation.evaluate import make_evaluator
from tercet.evaluation.evaluators import split_loss
from tercet.model.collectives import run_on_rank_0
from tercet.model.encoder import make_model, reloaded
from tercet.model.host_model import HostModel
from tercet.model.loss import make_loss
from tercet.model.saved_form import SavedForm, prove_saving
from tercet.planning.parallelism import shards_weights
from tercet.planning.plan import TrainPlan
from tercet.planning.rows import PlannedRows, concatenate, load_splits, load_train_rows, rows_to_order
from tercet.storage import Storage, layout
from tercet.training.accumulation import BatchTrial
from tercet.training.arguments import column_prompts, gathers, training_arguments
from tercet.training.attempt import HeldRun
from tercet.training.callbacks import LeaseGuard, RunRecorder, StopOnPreemption
from tercet.training.choices import choose_once
from tercet.training.forward import resolve_forward
from tercet.training.guards import Deadline, LearningGuard
from tercet.training.token_ids import TokenSource
from tercet.training.trainer import TercetTrainer

logger = logging.getLogger("tercet")


class TrainingRows(NamedTuple):
    """The rows of a plan, memory-mapped on this machine."""

    splits: dict[str, Dataset]
    """Train, eval and test of the dataset that the model is measured on."""
    parts: list[PlannedRows]
    """The rows of each dataset that are trained on, in the plan's order."""
    train: Dataset
    """All parts, one after the other."""


def make_arguments(plan: TrainPlan, output_dir: Path) -> SentenceTransformerTrainingArguments:
    """Return the trainer's arguments. Joins this process to its group, where there is one.

    output_dir: of this rank alone, because sentence-transformers' `_save` assumes that only one process calls it.
    Raises PlanError as `training_arguments` does."""
    args = SentenceTransformerTrainingArguments(**training_arguments(plan, output_dir))
    # sentence-transformers sets it for several ranks, on behalf of its own training batches. Here it would only hit the
    # eval loss, which would miss the rows that fill no batch, and of the rest all but the last batch of rank 0.
    args.dataloader_drop_last = False
    return args


def load_rows(plan: TrainPlan, storage: Storage) -> TrainingRows:
    """Bring the rows of the plan's datasets to this machine. Raises ConfigError where train rows leak held-out text."""
    splits = load_splits(plan, storage)
    parts = load_train_rows(plan, storage, splits)
    return TrainingRows(splits, parts, concatenate(parts))


def make_trainer(
    plan: TrainPlan,
    run: HeldRun,
    args: SentenceTransformerTrainingArguments,
    rows: TrainingRows,
    guide: SentenceTransformer | None,
    start_dir: Path,
    trial: BatchTrial,
) -> TercetTrainer:
    """Return the trainer of this rank, with the model of the checkpoint that the run resumes from.

    guide: a frozen model that the loss reads. start_dir: where the weights of the plan's champion are brought to.
    trial: of the longest micro-batch, before the first step."""
    config, training = plan.config, plan.config.training
    set_seed(training.seed)  # weights that the base model's files do not have are drawn at random
    start = config.model
    if plan.starts_from is not None:
        start = reloaded(config.model, run.storage, plan.starts_from, start_dir)
    model = make_model(start, str(args.device), run.resume_dir)
    saved_form = run_on_rank_0(
        lambda: choose_once(
            run.storage, layout.saved_form_key(plan.run_id), SavedForm, lambda: _try_saving(start, model)
        )
    )
    # Before the forward pass and the trainer change the model.
    host_model = HostModel.of(start, model, gathers(plan)) if args.process_index == 0 else None
    args.prompts = column_prompts(tuple(rows.train.column_names), model.prompts)
    loss = make_loss(config.loss, model, guide)
    forward = resolve_forward(plan, run.storage, model, guide, args.device)
    if args.process_index == 0:
        logger.info("forward pass: %s (%s)", forward.packing, forward.reason)
    eval_batch_size = config.evaluation.batch_size
    eval_loss = split_loss(config.loss, model, rows.splits["eval"], plan.rows_per_loss_call, eval_batch_size)
    # The baseline. Not by `trainer.evaluate()` before `train()`: accelerate 1.15 then takes the model for prepared,
    # skips DistributedDataParallel without a word, and each rank trains a model of its own.
    args.eval_on_start = run.commit is None
    return TercetTrainer(
        tokens=_token_source(plan, run.storage, rows.parts, is_on_gpu=args.device.type == "cuda"),
        batches=RankBatches(
            datasets=rows_to_order(plan, rows.parts),
            global_batch_size=training.global_batch_size,
            gradient_accumulation_steps=training.num_micro_batches,
            rank=args.process_index,
            world_size=args.world_size,
            seed=training.seed,
            row_tokens=estimated_tokens(rows.train, model.max_seq_length) if args.world_size > 1 else None,
            # A loss that calls the model itself, or reads texts, cannot take rows that others embedded. Where weights
            # are sharded, all ranks must make equally many forward passes.
            copies_last=config.loss.is_cached
            or guide is not None
            or (shards_weights(plan.parallelism) and forward.packing == "chunked"),
        ),
        parallelism=plan.parallelism,
        host_model=host_model,
        gathers=gathers(plan),
        loss_runs_backward=config.loss.is_cached,
        scales_loss=training.precision == "fp16",
        forward=forward,
        before_first_step=trial,
        loss_reads_texts=guide is not None,
        precision=training.computed_precision,
        saved_form=saved_form,
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.splits["eval"],
        loss=loss,
        evaluator=make_evaluator(
            rows.splits, "eval", eval_batch_size, eval_loss, precision=training.computed_precision
        ),
    )


def _token_source(plan: TrainPlan, storage: Storage, parts: list[PlannedRows], is_on_gpu: bool) -> TokenSource | None:
    """Return where token ids are cached; None if this run neither makes nor finds any."""
    workers = plan.config.workers
    cache_dir = cache_dir_of(workers)
    is_made = is_on_gpu if workers.token_cache == "auto" else workers.token_cache
    if workers.token_cache is False or not (is_made or has_tokens(cache_dir)):
        return None
    manifests = [read_manifest(storage, part.dataset.name, part.dataset.version) for part in parts]
    shards = [manifest.splits["train"] for manifest in manifests]
    # A file holds a whole shard: not worth it for few of its rows.
    uses_most = 2 * sum(len(part.rows) for part in parts) >= sum(m.num_rows["train"] for m in manifests)
    return TokenSource(parts, shards, cache_dir, is_made and uses_most)


def _try_saving(start: ModelConfig, model: SentenceTransformer) -> SavedForm:
    """Prove that the model can be saved and loaded again, and log how. Raises ConfigError if not."""
    started = time.monotonic()
    saved_form = prove_saving(start, model)
    tried = "the model"
    if saved_form.num_layers is not None:
        tried = (
            f"a copy of the model with {saved_form.num_layers} layers, as memory or disk has no room for a whole one,"
        )
    text = "saving: %s is the same after it was saved and loaded again: %d weights (%.1f s)"
    logger.info(text, tried, saved_form.num_weights, time.monotonic() - started)
    return saved_form


def add_callbacks(
    trainer: TercetTrainer,
    plan: TrainPlan,
    run: HeldRun,
    uploader: Uploader,
    notice: Callable[[], bool],
    report: Callable[[dict[str, Any]], None] | None,
    export: Callable[[Throughput], None] | None,
) -> tuple[RunRecorder, StopOnPreemption]:
    """Add guards, recorder, preemption and deadline to a trainer. Returns those that are asked after the training."""
    rank, seconds = trainer.args.process_index, plan.config.workers.step_timeout_seconds
    recorder = RunRecorder(plan, run.storage, uploader, trainer.ledger, trainer.meter, run.confirm, report, export)
    preemption = StopOnPreemption(notice, plan.steps_per_epoch, functools.partial(trainer.meter.phase, "ranks"))
    trainer.uploader = uploader
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LearningGuard(shards_weights(plan.parallelism)))
    if run.lease is not None:
        trainer.add_callback(LeaseGuard(run.lease.check))
    trainer.add_callback(recorder)
    trainer.add_callback(preemption)
    trainer.add_callback(Deadline(seconds, rank, functools.partial(run.report_hang, rank, seconds)))
    return recorder, preemption
