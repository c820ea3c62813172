"""Two ranks whose weights differ, under tercet's guard. Run under torchrun; prints the message of the guard."""

from types import SimpleNamespace

import torch

from tercet.errors import TrainingError
from tercet.training.guards import LEARNED_NOTHING_STEPS, LearningGuard

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
guard = LearningGuard()
guard.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
with torch.no_grad():
    model.weight += 1.0 + 0.1 * rank  # each rank moves, in its own direction
try:
    guard.on_step_end(None, SimpleNamespace(global_step=LEARNED_NOTHING_STEPS), None, model=model)
except TrainingError as error:
    print(f"rank {rank}: {error}", flush=True)
torch.distributed.destroy_process_group()
