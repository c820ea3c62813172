"""Runs with a best model, and decisions, as small as they can be: what the registry publishes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tercet.artifacts.checkpoint import Commit, upload_files
from tercet.artifacts.decision import GateDecision, Origin, Verdict
from tercet.artifacts.lease import Attempt
from tercet.artifacts.registry import Lineage
from tercet.config.sections import GateConfig
from tercet.storage import Storage
from tercet.storage.documents import seal
from tercet.storage.layout import COMMIT, best_prefix


def finished_run(storage: Storage, run_id: str, weights: bytes = b"") -> Lineage:
    """Store two files and a COMMIT below runs/<run_id>/best, and return the lineage of the run."""
    with tempfile.TemporaryDirectory() as local:
        (Path(local) / "model.safetensors").write_bytes(weights or run_id.encode() * 500)
        (Path(local) / "1_Pooling").mkdir()
        (Path(local) / "1_Pooling" / "config.json").write_text(f'{{"of": "{run_id}"}}')
        as_best_model(storage, run_id, Path(local), {"ndcg@10": 0.5})
    return Lineage(run_id=run_id, recipe_hash="370c47fc", dataset_versions={"poems": "0123456789abcdef"})


def as_best_model(storage: Storage, run_id: str, folder: Path, metrics: dict[str, float] | None = None) -> Commit:
    """Commit the files of a folder as the best model of a run."""
    prefix = best_prefix(run_id)
    attempt = Attempt(name="a", generation=1, first_step=0, world_size=1)
    files = upload_files(storage, folder, prefix)
    commit = Commit(step=8, epoch=1.0, lineage=(attempt,), folder=prefix, metrics=metrics or {}, files=files)
    storage.put(f"{prefix}/{COMMIT}", seal(commit))
    return commit


def decision(verdict: Verdict = "promote", sentence: str = "It is better.") -> GateDecision:
    """A decision with this verdict."""
    return GateDecision(
        verdict=verdict,
        reasons=("better",) if verdict == "promote" else ("not_better",),
        sentence=sentence,
        reference="champion",
        metric="ndcg@10",
        estimate=None,
        p_better=0.001,
        mcnemar_p=None,
        minimum_detectable_effect=None,
        others=(),
        out_of_domain=(),
        slices=(),
        origin=Origin(),
        results_sha256={},
        config=GateConfig(),
    )
