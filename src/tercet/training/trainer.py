"""SentenceTransformerTrainer with tercet's order of rows and checkpoints, in every parallelism."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from tercet.artifacts.throughput import log_entry
from tercet.config.sections import Parallelism
from tercet.data.order import MicroBatch, RankBatches
from tercet.failpoints import crash_point
from tercet.model.collectives import gather_objects
from tercet.model.fused_attention import is_wanted
from tercet.model.host_model import HostModel
from tercet.model.loss import loss_of, not_gathering
from tercet.model.packed_model import Forward
from tercet.model.row import ChunkBatch, RowBatch
from tercet.model.saved_form import SavedForm
from tercet.model.sharding import check_recomputes, check_wrapped, unit_classes
from tercet.model.weight_casts import cast_by_layer
from tercet.planning.parallelism import is_zero
from tercet.training.checkpointing import CheckpointingTrainer
from tercet.training.deepspeed_engine import OneReduction, gather_small_exactly
from tercet.training.embedding_gradient import embedding_gradient
from tercet.training.guards import NonFiniteGuard
from tercet.training.meter import BatchSize, Meter, arithmetic_of
from tercet.training.peak import peak_of
from tercet.training.prefetch import Prefetcher
from tercet.training.shared_loss import shared_loss
from tercet.training.token_ids import TokenSource, open_token_ids

logger = logging.getLogger("tercet")


class EpochLoader(DataLoader):  # type: ignore[misc]
    """A DataLoader that passes the epoch on to its batch sampler; the trainer calls `set_epoch` where it exists."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self.batch_sampler.set_epoch(epoch)


class TercetTrainer(CheckpointingTrainer):
    """Overrides methods of sentence-transformers 6.2 and transformers 5.23; each says why."""

    def __init__(
        self,
        batches: RankBatches,
        parallelism: Parallelism,
        host_model: HostModel | None,
        loss_runs_backward: bool,
        scales_loss: bool,
        forward: Forward,
        before_first_step: Callable[[Any], None] = lambda _: None,
        loss_reads_texts: bool = False,
        tokens: TokenSource | None = None,
        precision: str = "fp32",
        saved_form: SavedForm | None = None,
        gathers: bool = False,
        **kwargs: Any,
    ) -> None:
        """batches: the order of rows; `ledger` records which of them were trained on.
        host_model, saved_form, gathers: passed to CheckpointingTrainer.
        loss_runs_backward: the loss runs a backward pass of its own for each mini-batch (gradient caching).
        scales_loss: passed to NonFiniteGuard.
        forward: how the columns of a batch share a forward pass.
        before_first_step: called with this trainer once model and optimizer are wrapped and loaded.
        loss_reads_texts: the loss has a guide, and may tokenize by itself. Otherwise the evaluator measures the loss
        too.
        tokens: where token ids of the rows may be cached; None to tokenize each batch.
        precision: in which matrices are multiplied, for the meter."""
        self._forward, self._loss_reads_texts = forward, loss_reads_texts
        self._micro_batch: MicroBatch | None = None
        """The one that is trained on; None outside of a training step."""
        self._before_first_step = before_first_step
        self._batches, self._loss_runs_backward = batches, loss_runs_backward
        self._ahead: Prefetcher[Any] = Prefetcher()
        super().__init__(parallelism, host_model, saved_form, gathers, **kwargs)
        is_cached = tokens is not None and forward.packing == "packed" and not loss_reads_texts
        self._tokens = (
            open_token_ids(tokens, self.data_collator, self.model) if tokens is not None and is_cached else None
        )
        if self._tokens is not None and self._tokens.is_complete and self.args.process_index == 0:
            logger.info("token ids: all of the train rows are in this machine's cache")
        if is_wanted() and parallelism == "ddp" and self.args.device.type == "cuda":
            cast_by_layer(self.model)
        self._finite = NonFiniteGuard(self.args.device, scales_loss)
        self.add_callback(self._finite)
        device = self.args.device
        self.meter = Meter(arithmetic_of(self.model, loss_runs_backward), peak_of(device, precision), device)
        self.meter.count_positions(self.model)
        self._host_group: Any = None
        # Not if the scaler may skip a step: clipping would leave NaN in rows that the next step does not clear.
        can_be_sparse = parallelism == "ddp" and not scales_loss
        self._embedding = embedding_gradient(self.model) if can_be_sparse else None

    def create_accelerator_and_postprocess(self) -> None:
        """Extends `Trainer.create_accelerator_and_postprocess`.

        DDP keeps gradients in the buckets that it sends, not beside them. On CPUs, accelerate 1.15 silently falls back
        from FSDP to DDP although it supports it, so FSDP is set here."""
        super().create_accelerator_and_postprocess()
        self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self._parallelism == "fsdp2" and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = unit_classes(self.model)
            # accelerate looks here for a final norm to wrap separately. Among the model's own modules it would find
            # Normalize, which has no weights, and fail.
            self.model.base_model_prefix = "transformers_model"
        if self.is_fsdp_enabled and self.args.bf16:
            # As in the other modes: fp32 weights, sums and embeddings. accelerate would use bf16 for all of them.
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def get_train_dataloader(self) -> DataLoader:
        """Replaces `BaseTrainer.get_train_dataloader`, with a batch sampler that already knows its rank.

        The original's batches are distributed over ranks by accelerate, which pads or drops the last ones, and its
        NO_DUPLICATES sampler looks at one rank only."""
        return EpochLoader(
            range(len(self.train_dataset)),  # `_collate` gets the numbers of rows
            batch_sampler=self._batches,
            collate_fn=self._collate,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _collate(self, rows: list[int]) -> dict[str, Any]:
        """Return a micro-batch as the forward pass takes it, so that a step has nothing left to prepare."""
        inputs: dict[str, Any] | None = self._tokens.collate(rows) if self._tokens is not None and rows else None
        if inputs is None:
            inputs = self.features_of(rows)
        return self.laid_out(inputs) if rows else inputs

    def laid_out(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the features of a micro-batch as the forward pass takes them."""
        if not self._forward.is_together or self._loss_reads_texts:
            return inputs
        columns, labels = self.collect_features(inputs)
        return {"batch": self._forward.batch(columns), "label": labels}

    def _prepare_input(self, data: Any) -> Any:
        """Extends `Trainer._prepare_input`, which waits for each copy to a GPU."""
        if isinstance(data, RowBatch | ChunkBatch):
            return data.to(self.args.device)
        if isinstance(data, torch.Tensor) and not data.is_floating_point():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, *args: Any) -> Any:
        """Extends `Trainer.get_batch_samples`: the next step's batches are made while this one runs."""
        batches_of_step = super().get_batch_samples

        def make() -> tuple[Any, list[BatchSize]]:
            samples = batches_of_step(epoch_iterator, *args)
            return samples, self.meter.sizes(samples[0])

        with self.meter.phase("data"):
            samples, sizes = make() if self._loss_reads_texts else self._ahead.get(epoch_iterator, make)
        self.meter.add(sizes)
        return samples

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Replaces `BaseTrainer.add_model_card_callback`: does nothing.

        The original encodes examples for a model card. tercet writes its own card, with results on the test split."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Extends `Trainer.train`: stops the thread that caches token ids."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._tokens is not None:
                self._tokens.close()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Extends `Trainer.log`: a line with a loss gets the throughput since the line before, of all ranks.

        The trainer has just read the loss, so the device is idle and the ranks have met."""
        if "loss" in logs:
            logs |= log_entry(self.meter.close_line(self._gather_on_hosts))
        super().log(logs, start_time)

    def _gather_on_hosts(self, own: Any) -> list[Any]:
        if not torch.distributed.is_initialized():
            return [own]
        if self._host_group is None:
            self._host_group = torch.distributed.new_group(backend="gloo")  # NCCL's would wait for the GPU
        return gather_objects(own, self._host_group)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Extends `Trainer.evaluate`: its time does not count as training."""
        self.meter.finish_device()
        with self.meter.phase("evaluation"):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Replaces `BaseTrainer.evaluation_loop`.

        The original encodes texts once for the loss and again for the metrics, and distributes the evaluator's work
        over ranks with DDP only. Here every rank runs the evaluator, which distributes the encoding (see
        evaluators.py), so that all ranks of a sharded model take part in each forward pass."""
        self._ahead.drain()
        self._finite.check(self.state.global_step, self.model)
        # ZeRO-3 needs forward passes outside inference mode before those of `encode`, or the model cannot be trained
        # afterwards: "Inference tensors cannot be saved for backward". The evaluator's loss replaces that of these.
        if self._loss_reads_texts or self._parallelism in ("zero3", "zero3_offload"):
            # MatryoshkaLoss draws widths, and a DataLoader a seed: keep the training's random state as it was.
            state = random.getstate()
            with torch.random.fork_rng(devices=[]):
                output = Trainer.evaluation_loop(self, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            random.setstate(state)
        else:
            output = EvalLoopOutput(None, None, {}, len(self.eval_dataset))
        crash_point("in_evaluation", self.state.global_step)
        metrics = self.evaluator(self.model, epoch=self.state.epoch, steps=self.state.global_step)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Extends `Trainer._init_training_state`: a run that resumes within an epoch starts at its own step.

        The original makes all batches before it, and discards them."""
        num_epochs, num_micro_batches = super()._init_training_state(*args, **kwargs)
        self._batches.skip(num_micro_batches // self.args.gradient_accumulation_steps)
        return num_epochs, num_micro_batches

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Replaces `BaseTrainer.compute_loss`: all columns are embedded together, and the loss gets their embeddings.

        The original passes the wrapped model to the loss, which calls it for each column. A loss with gradient caching
        still calls the model for each of its mini-batches."""
        if self._micro_batch is not None and not self._micro_batch.is_whole:
            return self._loss_of_last_batch(model, inputs)
        if not self._forward.is_together:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = loss_of(self.loss, *self._embed(model, inputs))
        return (loss, {}) if return_outputs else loss

    def _embed(self, model: Any, inputs: dict[str, Any]) -> tuple[list[Any], list[torch.Tensor], torch.Tensor | None]:
        """Return the columns of a micro-batch, the embeddings of each, and the labels."""
        if "batch" in inputs:
            embeddings = inputs["batch"].embed(model)
            return [{} for _ in embeddings], embeddings, inputs["label"]
        features, labels = self.collect_features(inputs)
        if self._forward.is_together:
            return features, self._forward.embed(model, features), labels
        return features, [model(column)["sentence_embedding"] for column in features], labels

    def _loss_of_last_batch(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the weighted loss of a micro-batch of a batch that is not whole: of all ranks' rows."""
        micro, self._micro_batch = self._micro_batch, None
        assert micro is not None
        with not_gathering(self.loss) if micro.shares is not None else contextlib.nullcontext():
            if micro.shares is None or micro.is_copied:
                return cast(torch.Tensor, micro.weight * self.compute_loss(model, inputs))
            _, embeddings, labels = self._embed(model, inputs)
            return micro.weight * shared_loss(self.loss, embeddings, labels, micro.shares)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Extends `Trainer.training_step`: records the rows of the micro-batch and its loss."""
        self._micro_batch = self._batches.handed_out[0]
        try:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        finally:
            self._micro_batch = None
        self._finite.add_loss(loss)
        if self._embedding is not None and self.accelerator.sync_gradients:
            self._embedding.average()
        crash_point("after_backward", self.state.global_step + 1)
        self.ledger.consume(self._batches.handed_out.popleft().own)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Replaces `Trainer._clip_grad_norm` with DDP, extends it with FSDP2: keeps the norm of each gradient.

        The norm of all gradients is computed from those norms anyway. DeepSpeed has clipped before this is called, and
        keeps none of them."""
        if self._parallelism == "ddp":
            self.accelerator.unscale_gradients()
            norm = torch.linalg.vector_norm(self._finite.add_gradients(self.model))
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
            return norm
        if not is_zero(self._parallelism):
            self._finite.add_gradients(self.model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Extends `Trainer._get_grad_norm`, called once per step: keeps the norms also if nothing is clipped."""
        if grad_norm is None and not is_zero(self._parallelism):
            self._finite.add_gradients(self.model)
        self._copies.before_update()
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.close_step(self.state.global_step + 1, norm)
        return norm

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Extends `Trainer._prepare_for_training`: checks the wrapped model, and loads tercet's own optimizer state.

        The weights were loaded with the model."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.meter.watch(self.model_wrapped)
        check_wrapped(self.model_wrapped, self._parallelism, self.args.world_size)
        if self.args.gradient_checkpointing:
            check_recomputes(self.model)
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate does this with DDP only. FSDP2's units take and return fp32 around weights of 16 bits.
            self.model.forward = self.accelerator.autocast()(self.model.forward)
        if self._loss_runs_backward and is_zero(self._parallelism):
            self.accelerator.deepspeed_engine_wrapped = OneReduction(self.model_wrapped)
        if is_zero(self._parallelism):
            gather_small_exactly(self.model_wrapped)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        elif self._gathers:
            self._rehearse_saving()
        self._before_first_step(self)
        return prepared

    def features_of(self, rows: list[int]) -> dict[str, Any]:
        """Return the features of a micro-batch of these rows, as the tokenizer makes them."""
        features: dict[str, Any] = self.data_collator(self.train_dataset.__getitems__(rows))
        return features
