"""The best run that one would write without tercet: SentenceTransformerTrainer, alone or under torchrun.

torchrun --nproc-per-node 2 benchmarks/plain_run.py --rows FOLDER --model FOLDER --out FILE [--precision bf16]
python benchmarks/plain_run.py ...

It evaluates the test split before and after training, and the eval split before training and after each epoch; at the
end it loads the best checkpoint. Ranks share evaluations, in-batch negatives are gathered, duplicates are found by
hashes. `FOLDER` holds train.jsonl, eval.jsonl, test.jsonl, and corpus.jsonl: all train rows, as the corpus to search.
The metrics are written to `FILE`.
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import (
    InformationRetrievalEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util.distributed import distributed_evaluation

Rows = list[dict[str, str]]


def evaluator(splits: dict[str, Rows], split: str, batch_size: int) -> Any:
    """The metrics that tercet reports, by sentence-transformers' own evaluators."""
    rows = splits[split]
    corpus = {row["positive"]: row["positive"] for name in (split, *sorted(splits)) for row in splits[name]}
    relevant: dict[str, set[str]] = {}
    for each in splits.values():
        for row in each:
            relevant.setdefault(row["anchor"], set()).add(row["positive"])
    queries = {row["anchor"]: row["anchor"] for row in rows}
    retrieval = InformationRetrievalEvaluator(
        queries, corpus, relevant, mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[10],
        map_at_k=[10], batch_size=batch_size, write_csv=False,
    )  # fmt: skip
    columns = [[row[name] for row in rows] for name in ("anchor", "positive", "negative")]
    return SequentialEvaluator([TripletEvaluator(*columns, batch_size=batch_size, write_csv=False), retrieval])


def main() -> None:
    """Run once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows-per-rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--dataloader-workers", type=int, default=0)
    arguments = parser.parse_args()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    splits: dict[str, Rows] = {
        name: [json.loads(line) for line in (arguments.rows / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval", "test", "corpus")
    }
    train = splits.pop("train")
    model = SentenceTransformer(arguments.model, device="cpu")
    model.max_seq_length = arguments.max_seq_length
    with tempfile.TemporaryDirectory(prefix="plain-") as folder:
        args = SentenceTransformerTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.rows_per_rank,
            per_device_eval_batch_size=arguments.rows_per_rank,
            num_train_epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            weight_decay=0.0,
            bf16=arguments.precision == "bf16",
            use_cpu=True,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            seed=42,
            batch_sampler="no_duplicates_hashed",
            dataloader_num_workers=arguments.dataloader_workers,
            dataloader_pin_memory=False,
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="cosine_ndcg@10",
            report_to="none",
            disable_tqdm=True,
        )
        test = evaluator(splits, "test", 64)

        def measure() -> dict[str, float]:
            if not dist.is_initialized():
                return dict(test(model))
            with distributed_evaluation(model) as is_mine:
                return dict(test(model)) if is_mine else {}

        before = measure()
        trainer = SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(splits["eval"]),
            loss=MultipleNegativesRankingLoss(model, gather_across_devices=dist.is_initialized()),
            evaluator=evaluator(splits, "eval", 64),
        )
        trainer.train()
        after = measure()
        if trainer.is_world_process_zero():
            names = {"ndcg@10": "cosine_ndcg@10", "triplet_accuracy": "cosine_accuracy"}
            found = {
                when: {name: float(metrics[key]) for name, key in names.items()}
                for when, metrics in (("before", before), ("after", after))
            }
            arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
