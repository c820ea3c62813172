"""What one rank does, top to bottom: data, model, loss, evaluator, trainer, train.

There is no Ray in it. It also runs by itself, or under torchrun:

    torchrun --no-python --nproc-per-node 2 tercet worker plan.json
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.artifacts import journal
from tercet.artifacts.best import retain
from tercet.artifacts.checkpoint import Commit, fetch, fetch_newest
from tercet.artifacts.lease import Attempt, Lease
from tercet.artifacts.uploader import Uploader
from tercet.errors import Preempted, StorageError
from tercet.model.libraries import import_quietly
from tercet.planning.engine_settings import environment
from tercet.planning.parallelism import shards_weights
from tercet.planning.plan import TrainPlan, check_engine
from tercet.storage import Storage, layout, open_storage
from tercet.storage.base import retries
from tercet.training.arguments import column_prompts, gathers, resolve_precision, training_arguments, use_cpu

logger = logging.getLogger("tercet")

Report = Callable[[dict[str, Any]], None]


def run_worker(
    plan: TrainPlan,
    report: Report | None = None,
    owner: str | None = None,
    notice: Callable[[], bool] = lambda: False,
) -> None:
    """Train this rank's share. `report` gets the metrics of each evaluation, on every rank. `owner` names who starts
    attempts at this run: one takes over from another of the same owner without waiting. `notice` tells whether this
    machine is about to be taken away.

    Everything that matters is in storage when this returns: evaluations, committed checkpoints, the training log.
    Raises Preempted after a notice, when the run is saved and there are steps left; PlanError for an engine that is
    not supported."""
    started = time.monotonic()
    check_engine(plan.engine, plan.run_id)
    plan = plan.on(int(os.environ.get("WORLD_SIZE", "1")))
    os.environ.update(environment(plan.parallelism, use_cpu(plan)))  # before anything imports DeepSpeed
    import_quietly()
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import PrinterCallback, set_seed

    from tercet.data.order import RankBatches
    from tercet.data.text_stats import estimated_tokens
    from tercet.evaluation.evaluate import make_evaluator
    from tercet.evaluation.evaluators import require_finite, split_loss
    from tercet.model.collectives import wait_for_all_ranks
    from tercet.model.encoder import make_model, reloaded, save_whole
    from tercet.model.loss import load_guide, make_loss
    from tercet.model.packed_model import prepare
    from tercet.planning.rows import concatenate, load_splits, load_train_rows, rows_to_order
    from tercet.training.callbacks import LeaseGuard, RunRecorder, StopOnPreemption
    from tercet.training.deepspeed_engine import prepare_process
    from tercet.training.guards import Deadline, LearningGuard
    from tercet.training.trainer import TercetTrainer

    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    plan = resolve_precision(plan, storage, use_cpu(plan))
    config = plan.config
    prepare_process(plan.parallelism, use_cpu(plan))
    guide = load_guide(config.loss)  # before the arguments: transformers would shard it for ZeRO-3
    with tempfile.TemporaryDirectory(prefix="tercet-worker-") as folder, contextlib.ExitStack() as held:
        # One folder a rank: sentence-transformers' `_save` believes that only one process calls it.
        args = SentenceTransformerTrainingArguments(**training_arguments(plan, Path(folder) / "out"))
        # sentence-transformers sets it where there are several ranks, for its own training batches. Here it would only
        # hit the eval loss: the rows that fill no batch left out, and of the rest all but the last batch of rank 0 too.
        args.dataloader_drop_last = False
        rank, world_size = args.process_index, args.world_size

        splits = load_splits(plan, storage)
        train_rows = load_train_rows(plan, storage, splits)
        train = concatenate(train_rows)
        resume_dir = Path(folder) / "resume"
        commit, attempt, lease = _take_the_run(storage, plan, owner or uuid.uuid4().hex, world_size, resume_dir, held)
        set_seed(config.training.seed)  # weights that the base model's files do not have are drawn at random
        start = config.model
        if plan.starts_from is not None:
            start = reloaded(config.model, storage, plan.starts_from, Path(folder) / "start")
        model = make_model(start, str(args.device), resume_dir if commit else None)
        args.prompts = column_prompts(tuple(train.column_names), model.prompts)
        loss = make_loss(config.loss, model, guide)
        forward = prepare(model, config.workers.packing, config.loss.is_cached, guide)
        if rank == 0:
            logger.info("forward pass: %s (%s)", forward.packing, forward.reason)
        eval_batch_size = config.evaluation.batch_size
        eval_loss = split_loss(config.loss, model, splits["eval"], plan.rows_per_loss_call, eval_batch_size)
        trainer = TercetTrainer(
            batches=RankBatches(
                datasets=rows_to_order(plan, train_rows),
                global_batch_size=config.training.global_batch_size,
                gradient_accumulation_steps=config.training.gradient_accumulation_steps,
                rank=rank,
                world_size=world_size,
                seed=config.training.seed,
                row_tokens=estimated_tokens(train, model.max_seq_length) if world_size > 1 else None,
            ),
            parallelism=plan.parallelism,
            save_whole=functools.partial(save_whole, start) if gathers(plan) else None,
            loss_runs_backward=config.loss.is_cached,
            scales_loss=config.training.precision == "fp16",
            forward=forward,
            loss_reads_texts=guide is not None,
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=splits["eval"],
            loss=loss,
            evaluator=make_evaluator(splits, "eval", eval_batch_size, eval_loss),
        )

        lineage = (*(commit.lineage if commit else ()), attempt)
        confirm = lease.confirm if lease is not None else lambda: None
        uploader = Uploader(storage, plan.run_id, lineage, rank, confirm)

        def on_evaluation(step: int, epoch: float, metrics: dict[str, float]) -> None:
            if rank == 0:
                confirm()
                entry = {"step": step, "epoch": epoch, **metrics}
                storage.put(layout.evaluation_key(plan.run_id, step), json.dumps(entry).encode())
                logger.info("step %d/%d  eval  %s", step, plan.num_steps, show_metrics(metrics))
            if report is not None:
                report({"step": step, "epoch": epoch, **metrics})

        def on_commit(done: Commit) -> None:
            logger.info("step %d/%d  checkpoint committed: %s", done.step, plan.num_steps, storage.uri_of(done.folder))
            retain(storage, plan.run_id, plan.metric, config.checkpoint.keep_last)

        trainer.remove_callback(PrinterCallback)
        save_every_steps = config.checkpoint.every_steps
        preemption = StopOnPreemption(notice, plan.steps_per_epoch)

        def on_hang() -> None:
            seconds = config.workers.step_timeout_seconds
            message = f"rank {rank} hung for {seconds} s"
            journal.report_incident(storage, plan.run_id, journal.end_name(attempt.generation), "hung", message)

        record = RunRecorder(uploader, trainer.ledger, plan.num_steps, save_every_steps, on_evaluation, on_commit)
        guards = [LearningGuard(shards_weights(plan.parallelism)), *([LeaseGuard(lease.check)] if lease else [])]
        deadline = Deadline(config.workers.step_timeout_seconds, rank, on_hang)
        for callback in (*guards, record, preemption, deadline):
            trainer.add_callback(callback)

        # The baseline. Not by `trainer.evaluate()` before `train()`: accelerate 1.15 then takes the model for prepared,
        # leaves DistributedDataParallel out without a word, and each rank trains a model of its own.
        args.eval_on_start = commit is None
        if commit is not None:
            logger.info("resuming from the checkpoint of step %d (%d workers)", commit.step, commit.attempt.world_size)
        seconds = {"worker_start": time.monotonic() - started}
        training_started = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume_dir) if commit else None)
        seconds["training"] = time.monotonic() - training_started
        uploader.close()
        if preemption.step is not None:
            wait_for_all_ranks()  # torchrun kills the others soon after the first one ends
            raise Preempted(
                f"the machine is about to be taken away; step {preemption.step} is saved",
                hint="the same command goes on from there, elsewhere",
            )
        seconds["last_upload"] = time.monotonic() - training_started - seconds["training"]
        if rank == 0:
            confirm()
            # Once more: an attempt that died after its last commit may have left what no commit comes to clean up.
            retain(storage, plan.run_id, plan.metric, config.checkpoint.keep_last)
            log = {
                "resumed_from_step": commit.step if commit else 0,
                "world_size": world_size,
                "parallelism": plan.parallelism,
                "precision": config.training.precision,
                "device": str(args.device),
                "seconds": require_finite(seconds, "time"),
                "storage_retries": dict(retries),
                "first_step_unix_seconds": record.first_step_unix_seconds,
                "log_history": trainer.state.log_history,
            }
            storage.put(layout.training_key(plan.run_id), json.dumps(log, indent=1).encode())
        wait_for_all_ranks()


def show_metrics(metrics: dict[str, float]) -> str:
    """One line: `loss 0.1234  ndcg@10 0.5678`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _take_the_run(
    storage: Storage, plan: TrainPlan, owner: str, world_size: int, resume_dir: Path, held: contextlib.ExitStack
) -> tuple[Commit | None, Attempt, Lease | None]:
    """The newest whole checkpoint, as rank 0 finds it, on the disk of every rank; this attempt; and on rank 0 the lease
    of the run, which is given back when `held` closes."""
    leases: list[Lease] = []

    def take() -> tuple[Commit | None, Attempt]:
        leases.append(Lease(storage, plan.run_id, owner, plan.config.checkpoint.lease_seconds))
        held.push(lambda _, error, __: leases[0].release(finished=error is None))
        if (lost := leases[0].unfinished_before) is not None:
            message = "it ended without saying why: a worker was killed, or its machine was lost"
            journal.report_incident(storage, plan.run_id, journal.end_name(lost.generation), "lost", message)
        generation = leases[0].generation

        def on_skip(step: int, error: StorageError) -> None:
            name = f"{generation:04d}-skipped-{step}"
            journal.report_incident(storage, plan.run_id, name, "checkpoint_skipped", str(error))

        newest = fetch_newest(storage, plan.run_id, resume_dir, on_skip)
        return newest, leases[0].begin(uuid.uuid4().hex[:12], newest.step if newest else 0, world_size)

    from tercet.model.collectives import run_on_rank_0

    commit, attempt = run_on_rank_0(take)
    held.push(functools.partial(_tell_end, storage, plan.run_id, attempt))
    if commit is not None and not leases:
        fetch(storage, commit, resume_dir)
    return commit, attempt, leases[0] if leases else None


def _tell_end(
    storage: Storage, run_id: str, attempt: Attempt, _: object, error: BaseException | None, __: object
) -> None:
    """Write down what ended this rank, where the error tells; and raise tercet's own where it stands for another's."""
    if error is None:
        return
    own = journal.as_tercet_error(error)
    if (kind := journal.kind_of(own)) is not None:
        journal.report_incident(storage, run_id, journal.end_name(attempt.generation), kind, str(own))
    if own is not error:
        raise own from error
