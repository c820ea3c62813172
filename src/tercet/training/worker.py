"""What one rank does, from the plan to the last commit. No Ray.

It also runs without Ray, as a single process or under torchrun:

    torchrun --no-python --nproc-per-node 2 tercet worker plan.json
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.artifacts.best import retain
from tercet.artifacts.throughput import Throughput, of_all_ranks
from tercet.artifacts.training_log import TrainingLog
from tercet.artifacts.uploader import Uploader
from tercet.errors import Preempted
from tercet.model.determinism import compute_deterministically
from tercet.model.libraries import import_quietly
from tercet.planning.engine_settings import allocator_environment, collective_timeout_seconds, environment
from tercet.planning.plan import TrainPlan, check_engine
from tercet.storage import layout, open_storage
from tercet.storage.base import retries
from tercet.storage.documents import seal
from tercet.training.arguments import use_cpu, with_device
from tercet.training.precision import resolve_precision

logger = logging.getLogger("tercet")

Report = Callable[[dict[str, Any]], None]
Export = Callable[[Throughput], None]
Notice = Callable[[], bool]


def run_worker(
    plan: TrainPlan,
    report: Report | None = None,
    owner: str | None = None,
    notice: Notice = lambda: False,
    export: Export | None = None,
) -> None:
    """Train this rank's share of a plan.

    When this returns, everything that matters is in storage: evaluations, committed checkpoints, the training log.

    report: gets the metrics of each evaluation, on every rank. owner: name of the process that starts attempts at this
    run; one attempt takes over from another of the same owner without waiting. notice: whether this machine is about to
    be taken away. export: gets, at each line of the log, this rank's throughput since the line before. Raises Preempted
    after a notice, once the run is saved, if steps are left; PlanError for an engine that is not supported; and as
    `BatchTrial`."""
    started = time.monotonic()
    check_engine(plan.engine, plan.run_id)
    os.environ.update(allocator_environment(plan.config.workers.use_gpu, os.environ))  # before torch is imported
    plan = with_device(plan.on(int(os.environ.get("WORLD_SIZE", "1"))))
    os.environ.update(environment(plan.parallelism, use_cpu(plan)))  # before anything imports DeepSpeed
    import_quietly()
    compute_deterministically(plan.config.training.deterministic)
    from tercet.evaluation.evaluators import require_finite
    from tercet.model.collectives import gather_objects, wait_for_all_ranks
    from tercet.model.loss import load_guide
    from tercet.training.accumulation import BatchTrial, resolve_accumulation
    from tercet.training.assembly import add_callbacks, load_rows, make_arguments, make_trainer
    from tercet.training.attempt import hold_run
    from tercet.training.deepspeed_engine import prepare_process

    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    plan, decides = resolve_accumulation(resolve_precision(plan, storage, use_cpu(plan)), storage)
    prepare_process(plan.parallelism, use_cpu(plan), collective_timeout_seconds(plan.config.workers))
    guide = load_guide(plan.config.loss)  # before the arguments: transformers would shard it for ZeRO-3
    with tempfile.TemporaryDirectory(prefix="tercet-worker-") as name:
        folder = Path(name)
        args = make_arguments(plan, folder / "out")
        rows = load_rows(plan, storage)
        with hold_run(storage, plan, owner or uuid.uuid4().hex, args.world_size, folder / "resume") as run:
            trial = BatchTrial(plan, run, decides)
            trainer = make_trainer(plan, run, args, rows, guide, folder / "start", trial)
            earlier = run.commit.throughput if run.commit is not None else None
            uploader = Uploader(storage, plan.run_id, run.lineage, args.process_index, run.confirm, earlier)
            recorder, preemption = add_callbacks(trainer, plan, run, uploader, notice, report, export)
            if (commit := run.commit) is not None:
                what = "resuming from the checkpoint of step %d (%d workers)"
                logger.info(what, commit.step, commit.attempt.world_size)
            training_started = time.monotonic()
            seconds = {"worker_start": training_started - started}
            trainer.meter.start()
            trainer.train(resume_from_checkpoint=str(run.resume_dir) if run.resume_dir else None)
            seconds["training"] = time.monotonic() - training_started
            with trainer.meter.phase("storage"):
                uploader.close()
            if preemption.step is not None:
                wait_for_all_ranks()  # torchrun kills the others soon after the first one ends
                saved = f"the machine is about to be taken away; step {preemption.step} is saved"
                raise Preempted(saved, hint="the same command resumes from there, on another machine")
            seconds["last_upload"] = time.monotonic() - training_started - seconds["training"]
            throughput = (earlier or Throughput()).then(of_all_ranks(gather_objects(trainer.meter.reading())))
            if args.process_index == 0:
                run.confirm()
                # Once more: an attempt that died after its last commit may have left files that no commit cleans up.
                retain(storage, plan.run_id, plan.metric, plan.config.checkpoint.keep_last)
                log = TrainingLog(
                    resumed_from_step=run.commit.step if run.commit else 0,
                    world_size=args.world_size,
                    parallelism=plan.parallelism,
                    precision=plan.config.training.computed_precision,
                    device=str(args.device),
                    seconds=require_finite(seconds, "time"),
                    storage_retries=dict(retries),
                    longest_batch_peak_bytes=trial.peak_bytes,
                    first_step_unix_seconds=recorder.first_step_unix_seconds,
                    log_history=trainer.state.log_history,
                    throughput=throughput,
                )
                storage.put(layout.training_key(plan.run_id), seal(log))
            wait_for_all_ranks()


def notice_of_sigterm() -> Notice:
    """Turn SIGTERM from the end of this process into a notice. Returns whether it has come.

    To be called in the main thread. Here because it must not import what `run_worker` prepares the environment for."""
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    return came.is_set
