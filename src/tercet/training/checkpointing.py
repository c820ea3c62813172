"""The part of the trainer that saves and loads checkpoints, in every parallelism.

In the step's thread, weights and optimizer state are copied to host memory, which may be a collective. Files are
written from there by the uploader's thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from transformers import set_seed

from tercet.artifacts.uploader import Uploader
from tercet.config.sections import Parallelism
from tercet.errors import ConfigError, CorruptObject
from tercet.model.collectives import run_on_rank_0
from tercet.model.host_model import HostModel
from tercet.model.saved_form import SavedForm, check_saved
from tercet.model.sharding import full_weights
from tercet.planning.parallelism import is_zero
from tercet.training import optimizer_state
from tercet.training.host_copies import HostCopies
from tercet.training.ledger import Ledger
from tercet.training.meter import Meter


class CheckpointingTrainer(SentenceTransformerTrainer):  # type: ignore[misc]
    """Overrides methods of sentence-transformers 6.2 and transformers 5.23; each says why."""

    meter: Meter
    """Set by the trainer of which this is a part."""

    def __init__(
        self,
        parallelism: Parallelism,
        host_model: HostModel | None,
        saved_form: SavedForm | None,
        gathers: bool,
        **kwargs: Any,
    ) -> None:
        """host_model: takes the weights, on rank 0; None on the others, and for a model that is never saved.
        saved_form: the tensors that a saved model must have; None for a model that is never saved.
        gathers: weights are sharded, or have an adapter to merge: try once, before the first step, to save them."""
        self._parallelism, self._host_model = parallelism, host_model
        self._saved_form, self._gathers = saved_form, gathers
        self.ledger = Ledger()
        self.uploader: Uploader | None = None
        """Writes what was copied, in its thread. Without one, a checkpoint is written at once."""
        super().__init__(**kwargs)
        self._copies = HostCopies(self.args.device)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Extends `Trainer._save_checkpoint`: its time does not count as training.

        The memory of the copies is free once the checkpoint before is written."""
        with self.meter.phase("storage"):
            if self.uploader is not None:
                self.uploader.wait_until_written()
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Replaces `Trainer.save_model` and `BaseTrainer._save`.

        The original drops the gathered weights, and writes what one rank holds. Here all ranks take part in gathering.
        Rank 0 copies the weights, writes them later, and checks that nothing is missing."""
        folder = Path(output_dir or self.args.output_dir)
        self._copy_weights()
        if self.args.should_save:
            self._write(lambda: self._write_model(folder))

    def _copy_weights(self) -> None:
        """Copy the weights to rank 0's host model. Every rank must call it."""
        with self._copies.copying():
            if self._host_model is not None:
                self._host_model.take(self.model, self._copies.copy)
            elif self._parallelism != "ddp":
                full_weights(self.model)

    def _write(self, write: Callable[[], Mapping[str, str]]) -> None:
        """Have files written from the copies made so far, by the uploader's thread if there is one."""
        wait_for_copies = self._copies.waiter()

        def job() -> Mapping[str, str]:
            wait_for_copies()
            return write()

        if self.uploader is None:
            job()
        else:
            self.uploader.write_later(job)

    def _write_model(self, folder: Path) -> Mapping[str, str]:
        """Write the host model to a folder, and check that nothing is missing. Returns no hashes."""
        assert self._host_model is not None
        assert self._saved_form is not None
        self._host_model.write(folder)
        check_saved(folder, self._saved_form)
        return {}

    def _rehearse_saving(self) -> None:
        """Gather the weights and save them once, as each checkpoint will. Raises ConfigError where that fails."""

        def save() -> None:
            wait_for_copies()
            with tempfile.TemporaryDirectory(prefix="tercet-rehearsal-") as folder:
                self._write_model(Path(folder))

        try:
            self._copy_weights()
            wait_for_copies = self._copies.waiter()
            run_on_rank_0(save)
        except CorruptObject as error:
            hint = "choose another workers.parallelism, or another model"
            raise ConfigError(f"{self._parallelism} cannot save this model: {error}", hint) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Replaces `Trainer._save_optimizer_and_scheduler`: one format for every parallelism; saves the ledger too."""
        rank, world_size, folder = self.args.process_index, self.args.world_size, Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with self._copies.copying():
            pieces = optimizer_state.pieces(self, self._parallelism)
            tensors = self._copies.copies(optimizer_state.tensors_of(pieces))
        self._write(lambda: optimizer_state.save(tensors, folder, rank, world_size))
        if is_zero(self._parallelism):  # its optimizer steps within the backward pass
            self._copies.before_update()
        self.ledger.save(folder, rank, world_size, self.state.global_step)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Replaces `BaseTrainer._load_from_checkpoint`, which cannot load sharded models: does nothing.

        The checkpoint's weights were loaded when the model was made."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Replaces `Trainer._load_optimizer_and_scheduler`: loads what `_save_optimizer_and_scheduler` wrote."""
        if checkpoint is not None:
            optimizer_state.load(optimizer_state.pieces(self, self._parallelism, create=True), Path(checkpoint))
            self.ledger.load(Path(checkpoint), self.args.process_index)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
            # The schedule sets the rate only after a step: the first step would run at the rate of step 0.
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Extends `Trainer._load_rng_state`: on another number of ranks, each seeds itself from seed, step and rank.

        The original leaves a rank unchanged if the checkpoint has no random state for it."""
        if checkpoint is not None and len([*Path(checkpoint).glob("rng_state*.pth")]) != self.args.world_size:
            # Python's random numbers must be equal on all ranks: MatryoshkaLoss draws its dimensions from them.
            set_seed((self.args.seed + self.state.global_step) % 2**32)
            torch.manual_seed((self.args.seed + 1_000_003 * self.state.global_step + self.args.process_index) % 2**32)
            return
        super()._load_rng_state(checkpoint)
