"""A worker in which a number that is not finite is planted at a step. Prints, on each rank, the error that ends it.

python planted.py PLAN KIND STEP    KIND: loss, gradient, weight, embedding
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tercet.errors import NonFiniteError
from tercet.model.sharding import local_values
from tercet.planning.plan import TrainPlan
from tercet.training import callbacks, trainer, worker

NAN = float("nan")
PARAMETER = "layer.1.output.dense.weight"
_, plan, kind, step = sys.argv


class Planting(trainer.TercetTrainer):  # type: ignore[misc]
    def is_time(self) -> bool:
        """Whether this is the step, or the evaluation after it."""
        return bool(self.state.global_step + self.model.training >= int(step))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        (parameter,) = (p for name, p in self.model.named_parameters() if name.endswith(PARAMETER))
        if (
            kind == "gradient" and self.is_time() and parameter.grad is not None
        ):  # DeepSpeed has none any more: the hook
            local_values(parameter.grad)[-1:] = NAN
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if kind == "gradient" and not hasattr(self, "hook"):
            (parameter,) = (p for name, p in self.model.named_parameters() if name.endswith(PARAMETER))
            self.hook = parameter.register_hook(lambda gradient: gradient * (NAN if self.is_time() else 1.0))
        if kind == "embedding" and not hasattr(self, "hook"):
            self.hook = self.model.register_forward_hook(self.spoil)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # On one rank alone: the others must end too.
        return loss * NAN if kind == "loss" and self.is_time() and self.args.process_index == 1 else loss

    def spoil(self, model: Any, _: Any, output: Any) -> None:
        if not model.training and self.state.global_step >= int(step):
            output["sentence_embedding"] = output["sentence_embedding"] * NAN


class PlantingRecord(callbacks.RunRecorder):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if kind == "weight" and state.global_step == int(step):
            (parameter,) = (p for name, p in kwargs["model"].named_parameters() if name.endswith(PARAMETER))
            with torch.no_grad():
                local_values(parameter)[-1:] = NAN


trainer.TercetTrainer, callbacks.RunRecorder = Planting, PlantingRecord
try:
    worker.run_worker(TrainPlan.model_validate_json(Path(plan).read_text(encoding="utf-8")))
except NonFiniteError as error:
    print(f"rank {os.environ['RANK']}: {error}", flush=True)
