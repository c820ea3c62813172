"""Evaluate a model on every rank. Run under torchrun: MODEL CASES.json OUT MODE.

A case is splits, each of columns of texts. Modes:

- `guarded`: each rank has the whole model, and each forward pass waits for all ranks, as it does under ZeRO-3;
- `sharded`: under FSDP2, and twice again, each time after a training step;
- `served`: inside sentence-transformers' `distributed_evaluation`, where one rank runs the evaluator.

Writes to OUT/<rank>.json, of each case: metrics, and how many texts each forward pass had. And OUT/<rank>.pt: what
`Encodings` has for all texts of the case.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.distributed import distributed_evaluation

from tercet.evaluation.encodings import Encodings
from tercet.evaluation.evaluate import make_evaluator

BATCH_SIZE = 4
HANG_SECONDS = 120

model_folder, cases_file, out, mode = sys.argv[1:]
dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_SECONDS))
rank = dist.get_rank()
model: Any = SentenceTransformer(model_folder, device="cpu")
texts_per_pass: list[int] = []


def count(_: Any, inputs: tuple[Any, ...]) -> None:
    """Wait for all ranks before each forward pass."""
    texts_per_pass.append(len(inputs[0]["input_ids"]))
    if mode == "guarded":
        # A rank with another number of passes meets another rank's different collective here, and both fail.
        number = torch.tensor([len(texts_per_pass), -len(texts_per_pass)])
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        assert number.tolist() == [len(texts_per_pass), -len(texts_per_pass)], "the ranks are at different passes"


def shard() -> None:
    """Shard each BERT layer as a unit of its own, and the remaining weights as one unit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model[0].auto_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train_a_step() -> None:
    """Make a training step with a meaningless loss, so that the weights move."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    features = model.preprocess(["bo da"])
    model(features)["sentence_embedding"].square().sum().backward()
    optimizer.step()


def measure(splits: dict[str, Dataset]) -> dict[str, Any]:
    """Return the metrics and forward passes of one evaluation."""
    texts_per_pass.clear()
    evaluator = make_evaluator(splits, "eval", BATCH_SIZE)
    metrics: dict[str, float] = {}
    with distributed_evaluation(model, enabled=mode == "served") as runs:
        if runs:
            metrics = evaluator(model)
    return {"metrics": metrics, "texts_per_pass": list(texts_per_pass)}


if mode == "sharded":
    shard()
model.register_forward_pre_hook(count)
results, embeddings = {}, {}
for name, case in json.loads(Path(cases_file).read_text()).items():
    results[name] = measure({split: Dataset.from_dict(columns) for split, columns in case.items()})
    if mode != "served":
        texts = [text for column in case["eval"].values() for text in column]
        embeddings[name] = Encodings().of(model, texts, "document", BATCH_SIZE)
        assert embeddings[name].requires_grad is False
if mode == "sharded":
    for _ in range(2):
        train_a_step()
        results["trained"] = measure({split: Dataset.from_dict(columns) for split, columns in case.items()})
Path(out, f"{rank}.json").write_text(json.dumps(results))
torch.save(embeddings, Path(out, f"{rank}.pt"))
dist.barrier()  # no rank closes its end of a connection while another still uses it
dist.destroy_process_group()
