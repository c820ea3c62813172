"""A training without tercet: SentenceTransformerTrainer, and a sampler that lists tercet's batches.

python plain_trainer.py MODEL STORE OUT
python plain_trainer.py MODEL STORE OUT LOSS MAX_ROWS ACCUMULATION_STEPS    # with the incomplete last batch
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss,
    TripletDistanceMetric,
    TripletLoss,
)
from torch.utils.data import BatchSampler

from tercet.data.order import global_batches, subset
from tercet.data.versions import read_manifest
from tercet.storage import open_storage
from tercet.storage.layout import version_prefix

SEED, NUM_EPOCHS, BATCH_SIZE = 42, 2, 16


def read_rows(store: Path, split: str) -> Dataset:
    """The rows of a split in shard order."""
    manifest = read_manifest(open_storage(str(store)), "tiny")
    folder = store / version_prefix("tiny", manifest.version)
    tables = [pq.read_table(folder / shard.path) for shard in manifest.splits[split]]
    return concatenate_datasets([Dataset(table) for table in tables]).select_columns(["anchor", "positive", "negative"])


class Batches(BatchSampler):
    """A batch sampler of given lists of rows, by epoch."""

    def __init__(self, rows: Dataset, keeps_last: bool, micro_batch_size: int) -> None:
        numbers: dict[str, int] = {}
        texts = [[numbers.setdefault(row[name], len(numbers)) for name in rows.column_names] for row in rows]
        ids = np.array(texts, dtype=np.int64)
        self.epochs = [
            [
                batch.tolist()[start : start + micro_batch_size]
                for batch in global_batches(len(rows), BATCH_SIZE, SEED, epoch, ids.__getitem__, keeps_last=keeps_last)
                for start in range(0, len(batch), micro_batch_size)
            ]
            for epoch in range(NUM_EPOCHS)
        ]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Any:
        return iter(self.epochs[self.epoch])


def train(model_dir: Path, rows: Dataset, out: Path, loss_name: str, keeps_last: bool = False, steps: int = 1) -> None:
    """Train, and write the model to OUT/loss_name."""
    model = SentenceTransformer(str(model_dir), device="cpu")
    if loss_name == "triplet":
        loss: Any = TripletLoss(model, distance_metric=TripletDistanceMetric.COSINE, triplet_margin=0.5)
    else:
        loss = MultipleNegativesRankingLoss(model, scale=20.0)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=BATCH_SIZE // steps,
        gradient_accumulation_steps=steps,
        num_train_epochs=NUM_EPOCHS,
        learning_rate=0.005,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=SEED,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        batch_sampler=lambda dataset, **_: Batches(dataset, keeps_last, BATCH_SIZE // steps),
    )
    SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(out / loss_name))


if __name__ == "__main__":
    model_dir, store, out = map(Path, sys.argv[1:4])
    if sys.argv[4:]:
        loss_name, max_rows, steps = sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
        rows = read_rows(store, "train")
        rows = rows.select(subset(len(rows), max_rows, SEED))
        train(model_dir, rows, out, loss_name, keeps_last=True, steps=steps)
        sys.exit()
    for loss_name in ("ranking", "triplet"):
        train(model_dir, read_rows(store, "train"), out, loss_name)
