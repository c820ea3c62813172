"""A model measured row by row for a comparison, kept in storage: measured once, whoever compares.

The model is read from storage, verified, in a process that has seen nothing of training. `<data>` in a file's name is
`test`, or the name of a dataset out of domain.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tercet.artifacts.checkpoint import Commit, FileRecord, upload_files
from tercet.artifacts.decision import CANDIDATE, StoredRole
from tercet.data.cache import cache_dir_of, load_split
from tercet.data.row_checks import row_hash
from tercet.data.versions import read_manifest
from tercet.errors import CorruptObject, ObjectNotFound
from tercet.evaluation.evaluate import load_reloaded
from tercet.model.libraries import import_quietly
from tercet.planning.plan import TrainPlan
from tercet.planning.rows import load_splits, load_train_rows
from tercet.storage import Storage, layout, open_storage
from tercet.storage.documents import Document, Frozen, seal, unseal

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TEST = "test"
KINDS = ("queries", "triplets")


class Request(Frozen):
    """Which model to measure, and on what beside the test split."""

    role: StoredRole = Field(validation_alias="who", serialization_alias="who")
    commit: Commit | None
    """Of the model; None for the recipe's base model."""
    out_of_domain: dict[str, str]
    """Versions of datasets, by name; of each the test split."""


class Measurement(Document):
    """The document that makes a measurement count."""

    request: Request
    files: dict[str, FileRecord]
    num_corpus_texts: int
    """Of the test split's corpus."""
    seconds_per_text: float
    """Of embedding it."""
    num_non_finite_weights: int
    """NaN or Inf."""
    num_leaked_rows: int
    """Rows trained on that hold anchor and positive of a row of the test split; counted for the candidate."""


def measure(plan: TrainPlan, request: Request) -> None:
    """Measure a model, unless storage has these very results. Raises NonFiniteError, CorruptObject."""
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    if read_measured(storage, plan.run_id, request) is not None:
        return
    import_quietly()
    from tercet.evaluation.row_results import row_results

    batch_size = plan.config.evaluation.batch_size
    with tempfile.TemporaryDirectory(prefix="tercet-measure-") as temporary:
        model = load_reloaded(plan, storage, request.commit, Path(temporary) / "model")
        splits = load_splits(plan, storage)
        num_leaked_rows = _num_leaked_rows(plan, storage, splits) if request.role == CANDIDATE else 0
        splits[TEST] = _with_labels(plan, storage, plan.datasets[0].name, plan.dataset_version, TEST)
        folder = Path(temporary) / "results"
        folder.mkdir()
        results = row_results(model, splits, TEST, batch_size)
        _write(folder, TEST, results.queries, results.triplets)
        for name, version in request.out_of_domain.items():
            others = {split: _with_labels(plan, storage, name, version, split) for split in ("train", "eval", TEST)}
            found = row_results(model, others, TEST, batch_size)
            _write(folder, name, found.queries, found.triplets)
        measured = Measurement(
            request=request,
            files=upload_files(storage, folder, layout.comparison_prefix(plan.run_id, request.role.key)),
            num_corpus_texts=results.num_corpus_texts,
            seconds_per_text=results.seconds_per_text,
            num_non_finite_weights=sum(int((~values.isfinite()).sum()) for values in model.parameters()),
            num_leaked_rows=num_leaked_rows,
        )
    storage.put(layout.measured_key(plan.run_id, request.role.key), seal(measured))


def read_measured(storage: Storage, run_id: str, request: Request) -> Measurement | None:
    """What was measured, if it was of this very model on this very data. A damaged document counts for none."""
    key = layout.measured_key(run_id, request.role.key)
    try:
        measured = unseal(Measurement, storage.read(key), storage.uri_of(key))
    except (ObjectNotFound, CorruptObject):
        return None
    return measured if measured.request == request else None


def read_table(storage: Storage, run_id: str, measured: Measurement, data: str, kind: str) -> pa.Table | None:
    """One table of row_results.py; None for triplets of pairs. Raises CorruptObject, ObjectNotFound."""
    import pyarrow.parquet as pq

    name = f"{data}-{kind}.parquet"
    record = measured.files.get(name)
    if record is None:
        return None
    with tempfile.TemporaryDirectory(prefix="tercet-results-") as folder:
        path = Path(folder) / name
        storage.download(
            layout.row_results_key(run_id, measured.request.role.key, data, kind), path, sha256=record.sha256
        )
        return pq.read_table(path)


def groups_of(table: pa.Table) -> list[str]:
    """The group of each row of such a table: rows that are alike, of one `group` or else of one anchor."""
    groups: list[str] = table["group" if "group" in table.column_names else "anchor"].to_pylist()
    return groups


def _write(folder: Path, data: str, *tables: pa.Table | None) -> None:
    import pyarrow.parquet as pq

    for kind, table in zip(KINDS, tables, strict=True):
        if table is not None:
            pq.write_table(table, folder / f"{data}-{kind}.parquet", compression="zstd")


def _with_labels(plan: TrainPlan, storage: Storage, name: str, version: str, split: str) -> Dataset:
    manifest = read_manifest(storage, name, version)
    return load_split(storage, manifest, split, cache_dir_of(plan.config.workers))


def _num_leaked_rows(plan: TrainPlan, storage: Storage, splits: dict[str, Dataset]) -> int:
    held_out = {row_hash(pair) for pair in zip(splits[TEST]["anchor"], splits[TEST]["positive"], strict=True)}
    return sum(
        row_hash(pair) in held_out
        for part in load_train_rows(plan, storage, splits)
        for batch in part.rows.select_columns(["anchor", "positive"]).iter(batch_size=1000)
        for pair in zip(batch["anchor"], batch["positive"], strict=True)
    )
