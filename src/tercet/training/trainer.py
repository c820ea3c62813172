"""The trainer: SentenceTransformerTrainer, with tercet's order of rows and checkpoints, in every parallelism."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from sentence_transformers import SentenceTransformerTrainer
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput

from tercet.config.sections import Parallelism
from tercet.data.order import RankBatches
from tercet.failpoints import crash_point
from tercet.model.packed_model import Forward
from tercet.model.sharding import check_recomputes, check_saved, check_wrapped, full_weights, unit_classes
from tercet.planning.parallelism import is_zero
from tercet.training import optimizer_state
from tercet.training.deepspeed_engine import OneReduction, gather_small_exactly
from tercet.training.embedding_gradient import embedding_gradient
from tercet.training.guards import NonFiniteGuard
from tercet.training.ledger import Ledger
from tercet.training.prefetch import Prefetcher

logger = logging.getLogger("tercet")


class EpochLoader(DataLoader):  # type: ignore[misc]
    """A DataLoader that passes the epoch on to its batch sampler; the trainer calls `set_epoch` where it exists."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.batch_sampler.set_epoch(epoch)


class TercetTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Replaces what follows of sentence-transformers 6.2 and transformers 5.23, each for the reason it gives."""

    def __init__(
        self,
        batches: RankBatches,
        parallelism: Parallelism,
        save_whole: Callable[[dict[str, Any], Path], None] | None,
        loss_runs_backward: bool,
        scales_loss: bool,
        forward: Forward,
        loss_reads_texts: bool = False,
        **kwargs: Any,
    ) -> None:
        """batches: the order of rows; `ledger` says which of them were trained on.
        save_whole: writes a model from its gathered weights; None where the trained model itself can be written.
        loss_runs_backward: the loss runs a backward pass of its own for each mini-batch (gradient caching).
        scales_loss: as NonFiniteGuard takes it.
        forward: how the columns of a batch share a forward pass.
        loss_reads_texts: it has a guide, and may make tokens itself. Otherwise the evaluator measures it too."""
        self._forward, self._loss_reads_texts = forward, loss_reads_texts
        self._batches, self._parallelism = batches, parallelism
        self._save_whole, self._loss_runs_backward = save_whole, loss_runs_backward
        self.ledger = Ledger()
        self._ahead: Prefetcher[Any] = Prefetcher()
        super().__init__(**kwargs)
        self._finite = NonFiniteGuard(self.args.device, scales_loss)
        self.add_callback(self._finite)
        # Not where the scaler skips a step: clipping would leave NaN in rows that the next step does not touch.
        keeps = parallelism == "ddp" and not scales_loss
        self._embedding = embedding_gradient(self.model) if keeps else None

    def create_accelerator_and_postprocess(self) -> None:
        """After `Trainer.create_accelerator_and_postprocess`: DDP is told to keep gradients in the buckets that it
        sends, not beside them. On CPUs accelerate 1.15 falls back from FSDP to DDP without a word, though it can do it,
        so it is told to."""
        super().create_accelerator_and_postprocess()
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self._parallelism == "fsdp2" and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = unit_classes(self.model)
            # Where accelerate looks for a last norm to gather by itself. Among the model's own modules it would find
            # Normalize, which has no weights, and fail.
            self.model.base_model_prefix = "transformers_model"
        if self.is_fsdp_enabled and self.args.bf16:
            # As in the other modes: fp32 weights, sums and embeddings. accelerate would have bf16 for all of them.
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def get_train_dataloader(self) -> DataLoader:
        """Instead of `BaseTrainer.get_train_dataloader`: a batch sampler that already knows its rank. The original's is
        cut up among ranks by accelerate, which pads or drops the ends, and its NO_DUPLICATES holds within one rank
        only."""
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator: Any, *args: Any) -> Any:
        """Around `Trainer.get_batch_samples`: what the next step needs is made while this one runs."""
        make = functools.partial(super().get_batch_samples, epoch_iterator, *args)
        return make() if self._loss_reads_texts else self._ahead.get(epoch_iterator, make)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Instead of `BaseTrainer.add_model_card_callback`: nothing. It encodes examples for a card that tercet
        replaces with its own, which has the results on the test split."""

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Instead of `BaseTrainer.evaluation_loop`, which encodes texts once for the loss and again for the metrics,
        and shares the evaluator's work over ranks for DDP alone. Here every rank runs the evaluator, which shares the
        encoding (see evaluators.py), so that sharded models meet in each forward pass."""
        self._ahead.drain()
        self._finite.check(self.state.global_step, self.model)
        # ZeRO-3 must meet passes outside of inference mode before those of `encode`, or the model cannot be trained any
        # more: "Inference tensors cannot be saved for backward". The loss of these is replaced by the evaluator's.
        if self._loss_reads_texts or self._parallelism in ("zero3", "zero3_offload"):
            # A Matryoshka draws widths, a DataLoader a seed: the training's draws go on as if they had not.
            drawn = random.getstate()
            with torch.random.fork_rng(devices=[]):
                output = Trainer.evaluation_loop(self, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            random.setstate(drawn)
        else:
            output = EvalLoopOutput(None, None, {}, len(self.eval_dataset))
        crash_point("in_evaluation", self.state.global_step)
        metrics = self.evaluator(self.model, epoch=self.state.epoch, steps=self.state.global_step)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """After `Trainer._init_training_state`: a run that resumes amid an epoch begins there, instead of making the
        order of the rows before and throwing it away."""
        num_epochs, num_micro_batches = super()._init_training_state(*args, **kwargs)
        self._batches.skip(num_micro_batches // self.args.gradient_accumulation_steps)
        return num_epochs, num_micro_batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Instead of `BaseTrainer.compute_loss`, which gives the wrapped model to the loss, to be called for each
        column: all columns are embedded together, and the loss finds their embeddings. A loss with gradient caching
        still calls the model for each of its mini-batches."""
        if not self._forward.is_together:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        features, labels = self.collect_features(inputs)
        loss = self._forward.loss(self.loss, model, features, labels)
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Around `Trainer.training_step`: writes down which rows the micro-batch was made of, and its loss."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._finite.add_loss(loss)
        if self._embedding is not None and self.accelerator.sync_gradients:
            self._embedding.average()
        crash_point("after_backward", self.state.global_step + 1)
        self.ledger.consume(self._batches.handed_out.popleft())
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Instead of `Trainer._clip_grad_norm` where gradients are whole: the norm of all is made of the norm of each
        in any case; here each is kept. Around it for FSDP2. DeepSpeed has clipped by now, and keeps none."""
        if self._parallelism == "ddp":
            self.accelerator.unscale_gradients()
            norm = torch.linalg.vector_norm(self._finite.add_gradients(self.model))
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
            return norm
        if not is_zero(self._parallelism):
            self._finite.add_gradients(self.model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Around `Trainer._get_grad_norm`, which is called once a step: likewise where nothing is clipped."""
        if grad_norm is None and not is_zero(self._parallelism):
            self._finite.add_gradients(self.model)
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.close_step(self.state.global_step + 1, norm)
        return norm

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Around `Trainer._prepare_for_training`: checks what came out, and loads tercet's own state instead of each
        library's. The weights were loaded with the model."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        check_wrapped(self.model_wrapped, self._parallelism, self.args.world_size)
        if self.args.gradient_checkpointing:
            check_recomputes(self.model)
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate does this for DDP alone. FSDP2's units take and give fp32 around weights of 16 bits.
            self.model.forward = self.accelerator.autocast()(self.model.forward)
        if self._loss_runs_backward and is_zero(self._parallelism):
            self.accelerator.deepspeed_engine_wrapped = OneReduction(self.model_wrapped)
        if is_zero(self._parallelism):
            gather_small_exactly(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Instead of `BaseTrainer._load_from_checkpoint`, which does not know sharded models: nothing. The worker loads
        the checkpoint's weights when it makes the model."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Instead of `Trainer.save_model` and `BaseTrainer._save`, which drops the gathered weights and writes what one
        rank holds. Every rank takes part in the gathering; rank 0 writes, and checks that nothing is missing."""
        self._ahead.drain()
        folder = Path(output_dir or self.args.output_dir)
        weights = full_weights(self.model) if self._save_whole is not None else None
        if not self.args.should_save:
            return
        if self._save_whole is None:
            self.model.save_pretrained(str(folder), create_model_card=False)
            check_saved(folder, self.model)
        else:
            assert weights is not None
            self._save_whole(weights, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Instead of `Trainer._save_optimizer_and_scheduler`: one format for every parallelism, and the ledger."""
        pieces = optimizer_state.pieces(self, self._parallelism)
        optimizer_state.save(pieces, Path(output_dir), self.args.process_index, self.args.world_size)
        self.ledger.save(Path(output_dir), self.args.process_index, self.args.world_size, self.state.global_step)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Instead of `Trainer._load_optimizer_and_scheduler`, likewise."""
        if checkpoint is not None:
            optimizer_state.load(optimizer_state.pieces(self, self._parallelism, create=True), Path(checkpoint))
            self.ledger.load(Path(checkpoint), self.args.process_index)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
            # The schedule sets a rate after each step only: the first one would run at the rate of step 0.
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Around `Trainer._load_rng_state`, which leaves a rank as it is that was not there when the checkpoint was
        written: on another number of ranks each draws from the seed, the step and its own number."""
        if checkpoint is not None and len([*Path(checkpoint).glob("rng_state*.pth")]) != self.args.world_size:
            # Python's own numbers stay alike on all ranks: MatryoshkaLoss draws its dimensions from them.
            set_seed((self.args.seed + self.state.global_step) % 2**32)
            torch.manual_seed((self.args.seed + 1_000_003 * self.state.global_step + self.args.process_index) % 2**32)
            return
        super()._load_rng_state(checkpoint)
