"""Candidates that must never be promoted, each through measurement, gate and registry: how many are promoted?

python benchmarks/never_promoted.py [--trials 200] [--seed 0]

A tiny model and a few hundred rows, drawn again in each trial. Each candidate would win on its metrics, or is as good
as the champion: a copy of the champion's weights; weights with NaN or Inf in some places; a much better model whose
training rows hold answers of the test split. The same much better model without the leak is the control, which must be
promoted.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import tiny_model  # noqa: E402
from support.published import as_best_model  # noqa: E402
from tercet.artifacts.champion import Champion, read_champion  # noqa: E402
from tercet.artifacts.checkpoint import Commit  # noqa: E402
from tercet.artifacts.decision import CANDIDATE, GateDecision, Role  # noqa: E402
from tercet.artifacts.registry import Lineage, promote, register, serve  # noqa: E402
from tercet.config.recipe import Config  # noqa: E402
from tercet.data.build import build_version  # noqa: E402
from tercet.data.ingest import IngestOptions  # noqa: E402
from tercet.data.row_checks import RepeatCounter  # noqa: E402
from tercet.errors import NonFiniteError  # noqa: E402
from tercet.evaluation.comparison import compare  # noqa: E402
from tercet.evaluation.measurement import MeasuredModel, Request, measure, read_measured  # noqa: E402
from tercet.planning.survey import survey  # noqa: E402
from tercet.storage import Storage, open_storage  # noqa: E402

KINDS = ("copy", "not finite", "leaked", "control")
NUM_ROWS = 400
Weights = dict[str, torch.Tensor]


def knowing(weights: Weights, folder: Path) -> Weights:
    """A much better model: a word and its partner have one embedding."""
    from sentence_transformers import SentenceTransformer

    words = weights["embeddings.word_embeddings.weight"].clone()
    tokens = SentenceTransformer(str(folder), device="cpu").tokenizer.convert_tokens_to_ids
    for word, partner in zip(tiny_model.WORDS, tiny_model.PARTNERS, strict=True):
        words[tokens(word)] *= 10
        words[tokens(partner)] = words[tokens(word)]
    return {**weights, "embeddings.word_embeddings.weight": words}


def broken(weights: Weights, rng: random.Random) -> Weights:
    """Put NaN or Inf in up to ten places of one tensor."""
    name = rng.choice(sorted(weights))
    values = weights[name].clone().flatten()
    for _ in range(rng.randint(1, 10)):
        values[rng.randrange(len(values))] = rng.choice([float("nan"), float("inf"), float("-inf")])
    return {**weights, name: values.reshape(weights[name].shape)}


class Trial:
    """A store with a dataset and a champion, which is the untrained model."""

    def __init__(self, folder: Path, model: Path, rng: random.Random, num_leaked: int) -> None:
        self.storage: Storage = open_storage(str(folder / "store"))
        rows = tiny_model.triplets(NUM_ROWS, seed=rng.randrange(10**6))
        twins = [{**row, "group": f"twin-{number}"} for number, row in enumerate(rng.sample(rows, num_leaked))]
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twins]))
        with mock.patch.object(RepeatCounter, "leaked_pairs", return_value={}):  # tercet would exclude them
            build_version([path], self.storage, "tiny", IngestOptions(group="group"), fractions=(0.4, 0.1, 0.5))
        gate = {"min_groups": 20}
        self.plan = survey(Config.model_validate(tiny_model.recipe(model, self.storage.uri, gate=gate)), "candidate")[1]
        self._model, self._folder = model, folder
        self.weights = load_file(model / "model.safetensors")
        self.store("champion", self.weights)
        version = register(self.storage, "tiny", self.lineage("champion"), "benchmark")
        self.champion = serve(self.storage, version, None, "by hand", "the first", "benchmark")

    def lineage(self, run_id: str) -> Lineage:
        return Lineage(run_id=run_id, recipe_hash="", dataset_versions={})

    def store(self, run_id: str, weights: Weights) -> Commit:
        """Store a model as the best model of a run."""
        local = self._folder / run_id
        for path in self._model.rglob("*"):
            if path.is_file():
                target = local / path.relative_to(self._model)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        save_file(weights, local / "model.safetensors", metadata={"format": "pt"})
        return as_best_model(self.storage, run_id, local)

    def measured(self, role: Role, commit: Commit) -> MeasuredModel:
        request = Request(role=role, commit=commit, out_of_domain={})
        measure(self.plan, request)
        found = read_measured(self.storage, self.plan.run_id, request)
        assert found is not None
        return found

    def outcome(self, commit: Commit, champion_commit: Commit) -> str:
        """Measure, gate and register a candidate as a night does; return the outcome."""

        def decide(_: Champion | None) -> GateDecision:
            reference = self.measured(Role("champion", 1), champion_commit)
            return compare(self.plan, reference, self.measured(CANDIDATE, commit))

        try:
            decision = promote(self.storage, "tiny", self.lineage("candidate"), decide, "benchmark").decision
        except NonFiniteError:
            return "stopped: NaN or Inf in embeddings"
        assert decision is not None
        return f"{decision.verdict}: {', '.join(decision.reasons)}"


def main() -> None:
    """Print the outcomes of each kind of candidate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    outcomes: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    num_promoted = dict.fromkeys(KINDS, 0)
    with tempfile.TemporaryDirectory(prefix="never-") as name:
        model = tiny_model.tiny_bert(Path(name) / "model", tiny_model.all_texts())
        better = knowing(load_file(model / "model.safetensors"), model)
        for kind in KINDS:
            while outcomes[kind].total() < arguments.trials:
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    os.environ["TERCET_CACHE_DIR"] = str(Path(folder) / "cache")
                    trial = Trial(Path(folder), model, rng, rng.randint(1, 40) if kind == "leaked" else 0)
                    make: dict[str, Callable[[], Weights]] = {
                        "copy": lambda trial=trial: trial.weights,
                        "not finite": lambda: broken(better, rng),
                    }
                    commit = trial.store("candidate", make.get(kind, lambda: better)())
                    champion_commit = trial.store("champion", trial.weights)
                    num_leaked = (
                        trial.measured(CANDIDATE, commit).measurement.num_leaked_rows if kind == "leaked" else None
                    )
                    if num_leaked == 0:  # no twin is in train
                        continue
                    outcomes[kind][trial.outcome(commit, champion_commit)] += 1
                    champion = read_champion(trial.storage, "tiny")
                    num_promoted[kind] += champion is not None and champion.generation > 1
            print(f"{kind}: {num_promoted[kind]} of {arguments.trials} promoted")
            for outcome, count in outcomes[kind].most_common():
                print(f"  {count:>4}  {outcome}", flush=True)


if __name__ == "__main__":
    main()
