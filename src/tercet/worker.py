"""What one rank does, top to bottom: data, model, loss, evaluator, trainer, train.

There is no Ray in it. It also runs by itself, or under torchrun:

    torchrun --nproc-per-node 2 -m tercet.worker plan.json
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.checkpoint import Commit, fetch, fetch_newest, retain
from tercet.errors import TercetError
from tercet.lease import Attempt, Lease
from tercet.parallelism import deepspeed_settings, environment, fsdp_settings, is_zero, shards_weights
from tercet.plan import TrainPlan
from tercet.quiet import quiet_libraries
from tercet.storage import Storage, open_storage
from tercet.uploader import Uploader

logger = logging.getLogger("tercet")

Report = Callable[[dict[str, Any]], None]


def evaluation_key(run_id: str, step: int) -> str:
    """Where the metrics of one evaluation on the eval split lie."""
    return f"runs/{run_id}/evaluations/{step:08d}.json"


def training_key(run_id: str) -> str:
    """Where the log of a finished training lies."""
    return f"runs/{run_id}/training.json"


def run_worker(plan: TrainPlan, report: Report | None = None, owner: str | None = None) -> None:
    """Train this rank's share. `report` gets the metrics of each evaluation, on every rank. `owner` names who starts
    attempts at this run: one takes over from another of the same owner without waiting.

    Everything that matters is in storage when this returns: evaluations, committed checkpoints, the training log."""
    started = time.monotonic()
    os.environ.update(environment(plan.parallelism, use_cpu(plan)))  # before anything imports DeepSpeed
    quiet_libraries()
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import PrinterCallback, set_seed

    from tercet.evaluation import make_evaluator
    from tercet.guards import Deadline, FiniteLoss, HoldsTheRun, WeightsMove, finite
    from tercet.loss import load_guide, make_loss
    from tercet.mix import load_splits, load_train_rows, rows_to_order, together
    from tercet.model import make_model, save_whole
    from tercet.sampling import RankBatches
    from tercet.sharding import prepare_process
    from tercet.trainer import Record, TercetTrainer

    config = plan.config
    prepare_process(plan.parallelism, use_cpu(plan))
    guide = load_guide(config.loss)  # before the arguments: transformers would shard it for ZeRO-3
    storage = open_storage(config.storage.uri, config.storage.endpoint_url)
    with tempfile.TemporaryDirectory(prefix="tercet-worker-") as folder, contextlib.ExitStack() as held:
        # One folder a rank: sentence-transformers' `_save` believes that only one process calls it.
        args = SentenceTransformerTrainingArguments(**training_arguments(plan, Path(folder) / "out"))
        # sentence-transformers sets it where there are several ranks, for its own training batches. Here it would only
        # hit the eval loss: the rows that fill no batch left out, and of the rest all but the last batch of rank 0 too.
        args.dataloader_drop_last = False
        rank, world_size = args.process_index, args.world_size
        _check_world_size(plan, world_size)

        splits = load_splits(plan, storage)
        train_rows = load_train_rows(plan, storage, splits)
        train = together(train_rows)
        resume_dir = Path(folder) / "resume"
        commit, attempt, check = _take_the_run(storage, plan, owner or uuid.uuid4().hex, world_size, resume_dir, held)
        set_seed(config.training.seed)  # weights that the base model's files do not have are drawn at random
        model = make_model(config.model, str(args.device), resume_dir if commit else None)
        args.prompts = column_prompts(tuple(train.column_names), model.prompts)
        trainer = TercetTrainer(
            batches=RankBatches(
                datasets=rows_to_order(plan, train_rows),
                global_batch_size=config.training.global_batch_size,
                gradient_accumulation_steps=config.training.gradient_accumulation_steps,
                rank=rank,
                world_size=world_size,
                seed=config.training.seed,
            ),
            parallelism=plan.parallelism,
            save_whole=functools.partial(save_whole, config.model) if gathers(plan) else None,
            loss_runs_backward=config.loss.is_cached,
            model=model,
            args=args,
            train_dataset=train,
            eval_dataset=splits["eval"],
            loss=make_loss(config.loss, model, guide),
            evaluator=make_evaluator(splits, "eval", config.evaluation.batch_size),
        )

        lineage = (*(commit.lineage if commit else ()), attempt)
        uploader = Uploader(storage, plan.run_id, lineage, rank)

        def on_evaluation(step: int, epoch: float, metrics: dict[str, float]) -> None:
            if rank == 0:
                entry = {"step": step, "epoch": epoch, **metrics}
                storage.put(evaluation_key(plan.run_id, step), json.dumps(entry).encode())
                logger.info("step %d/%d  eval  %s", step, plan.num_steps, show_metrics(metrics))
            if report is not None:
                report({"step": step, "epoch": epoch, **metrics})

        def on_commit(done: Commit) -> None:
            logger.info("step %d/%d  checkpoint committed: %s", done.step, plan.num_steps, storage.uri_of(done.folder))
            retain(storage, plan.run_id, plan.metric, config.checkpoint.keep_last)

        trainer.remove_callback(PrinterCallback)
        save_every_steps = config.checkpoint.every_steps
        record = Record(uploader, trainer.ledger, plan.num_steps, save_every_steps, on_evaluation, on_commit)
        guards = (FiniteLoss(), WeightsMove(shards_weights(plan.parallelism)), HoldsTheRun(check))
        for callback in (*guards, record, Deadline(config.workers.step_timeout_seconds)):
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
        seconds["last_upload"] = time.monotonic() - training_started - seconds["training"]
        if rank == 0:
            # Once more: an attempt that died after its last commit may have left what no commit comes to clean up.
            retain(storage, plan.run_id, plan.metric, config.checkpoint.keep_last)
            log = {
                "resumed_from_step": commit.step if commit else 0,
                "world_size": world_size,
                "parallelism": plan.parallelism,
                "device": str(args.device),
                "seconds": finite(seconds, "time"),
                "first_step_unix_seconds": record.first_step_unix_seconds,
                "log_history": trainer.state.log_history,
            }
            storage.put(training_key(plan.run_id), json.dumps(log, indent=1).encode())
        _wait_for_all_ranks()


def use_cpu(plan: TrainPlan) -> bool:
    """Whether this process trains on its CPU."""
    import torch

    return plan.config.workers.use_gpu is False or not torch.cuda.is_available()


def gathers(plan: TrainPlan) -> bool:
    """Whether the trained model cannot be written as it is: sharded, or with an adapter to merge. ZeRO-1 and 2 lay all
    weights into one flat tensor, which safetensors refuses to write in parts."""
    return plan.parallelism != "ddp" or plan.config.model.lora is not None


def column_prompts(columns: tuple[str, ...], prompts: dict[str, str | None]) -> dict[str, str] | None:
    """The prompts for training: those that the model uses to encode queries and documents."""
    role = {column: "query" if column == "anchor" else "document" for column in columns}
    found = {column: prompts.get(name) or "" for column, name in role.items()}
    return {column: prompt for column, prompt in found.items() if prompt} or None


def training_arguments(plan: TrainPlan, output_dir: Path) -> dict[str, Any]:
    """The plan in the words of transformers' TrainingArguments."""
    training, on_cpu = plan.config.training, use_cpu(plan)
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": plan.rows_per_rank_and_micro_batch,
        "per_device_eval_batch_size": plan.rows_per_rank_and_micro_batch,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": training.num_epochs,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "use_cpu": on_cpu,
        # accelerate takes a backend as the promise of a process group, which a lone process has not.
        "ddp_backend": None if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "gloo" if on_cpu else "nccl",
        # The pooler, which nothing uses, is frozen. A model's own code may have more; looking for it costs time.
        "ddp_find_unused_parameters": plan.config.model.trust_remote_code,
        "dataloader_pin_memory": not on_cpu,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "steps",
        "logging_steps": training.log_every_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide what FiniteLoss looks for
        "report_to": "none",
        "disable_tqdm": True,
    }
    if training.precision == "tf32":
        arguments["tf32"] = True
    if is_zero(plan.parallelism):  # autocast is among DeepSpeed's settings
        arguments["deepspeed"] = deepspeed_settings(plan.config, plan.parallelism, plan.rows_per_rank_and_micro_batch)
    elif training.precision in ("bf16", "fp16"):
        arguments[training.precision] = True
    if plan.parallelism == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": fsdp_settings()}
    if training.gradient_checkpointing:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return arguments


def show_metrics(metrics: dict[str, float]) -> str:
    """One line: `loss 0.1234  ndcg@10 0.5678`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _take_the_run(
    storage: Storage, plan: TrainPlan, owner: str, world_size: int, resume_dir: Path, held: contextlib.ExitStack
) -> tuple[Commit | None, Attempt, Callable[[], None]]:
    """The newest whole checkpoint, as rank 0 finds it, on the disk of every rank; this attempt; and what raises on
    rank 0 once another attempt has taken the run. It is given back when `held` closes."""
    leases: list[Lease] = []

    def take() -> tuple[Commit | None, Attempt]:
        leases.append(Lease(storage, plan.run_id, owner, plan.config.checkpoint.lease_seconds))
        held.callback(leases[0].release)
        newest = fetch_newest(storage, plan.run_id, resume_dir)
        return newest, leases[0].begin(uuid.uuid4().hex[:12], newest.step if newest else 0, world_size)

    commit, attempt = _as_rank_0(take)
    if commit is not None and not leases:
        fetch(storage, commit, resume_dir)
    return commit, attempt, leases[0].check if leases else lambda: None


def _as_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; or raises, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return work()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [work()]
        except TercetError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], TercetError):
        raise box[0]
    return box[0]


def _wait_for_all_ranks() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def _check_world_size(plan: TrainPlan, world_size: int) -> None:
    if world_size != plan.config.workers.num_workers:
        raise TercetError(
            f"the plan is for {plan.config.workers.num_workers} workers, but {world_size} were started",
            hint="start as many processes as the plan says, or plan again with --set workers.num_workers",
        )


def main() -> int:
    """Run one rank from a plan file."""
    plan = TrainPlan.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run_worker(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
