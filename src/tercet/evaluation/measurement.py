"""One model measured row by row for a comparison. The results are kept in storage, and are measured only once.

The model is read from storage, verified, in a process that has seen nothing of training. `<data>` in a file's name is
`test`, or the name of a dataset out of domain.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from tercet.artifacts.checkpoint import Commit, FileRecord, upload_files
from tercet.artifacts.decision import CANDIDATE, StoredRole
from tercet.data.cache import cache_dir_of, load_split
from tercet.data.row_checks import row_hash
from tercet.data.versions import read_manifest
from tercet.errors import CorruptObject, ObjectNotFound
from tercet.evaluation.evaluate import load_reloaded, measuring_precision
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
    """Which model to measure, and on what besides the test split."""

    role: StoredRole = Field(validation_alias="who", serialization_alias="who")
    commit: Commit | None
    """The model's files; None for the recipe's base model."""
    out_of_domain: dict[str, str]
    """Dataset versions by dataset name; their test splits are measured too."""


class Measurement(Document):
    """The document that makes results valid. It is written last, with the hash of every file."""

    request: Request
    files: dict[str, FileRecord]
    num_corpus_texts: int
    """Texts in the corpus of the test split."""
    seconds_per_text: float
    """Time to embed one text of the test split."""
    precision: str = "fp32"
    """Precision in which the texts were embedded."""
    num_non_finite_weights: int
    """Weights that are NaN or infinite."""
    num_leaked_rows: int
    """Training rows with the anchor and positive of a row of the test split; counted for the candidate only."""


@dataclass(frozen=True)
class MeasuredModel:
    """A measurement with its tables, each of which is read from storage at most once."""

    measurement: Measurement
    storage: Storage = field(repr=False, compare=False)
    run_id: str
    _tables: dict[str, pa.Table] = field(default_factory=dict, repr=False, compare=False)

    def table(self, data: str, kind: str) -> pa.Table | None:
        """Return one table of row_results.py, or None for the triplets of a dataset of pairs.

        Raises CorruptObject and ObjectNotFound."""
        import pyarrow.parquet as pq

        name = f"{data}-{kind}.parquet"
        record = self.measurement.files.get(name)
        if record is None:
            return None
        if name not in self._tables:
            key = layout.row_results_key(self.run_id, self.measurement.request.role.key, data, kind)
            with tempfile.TemporaryDirectory(prefix="tercet-results-") as folder:
                self.storage.download(key, Path(folder) / name, sha256=record.sha256)
                self._tables[name] = pq.read_table(Path(folder) / name)
        return self._tables[name]

    def query_table(self) -> pa.Table:
        """Return the queries of the test split. Raises CorruptObject if they are missing."""
        table = self.table(TEST, "queries")
        if table is None:
            key = layout.row_results_key(self.run_id, self.measurement.request.role.key, TEST, "queries")
            raise CorruptObject(
                f"{self.storage.uri_of(key)} does not exist", hint="delete the run's comparison/ and start again"
            )
        return table


def measure(plan: TrainPlan, request: Request) -> None:
    """Measure a model and store the results, unless they are stored already, in the same precision.

    Raises NonFiniteError, CorruptObject."""
    storage = open_storage(plan.config.storage.uri, plan.config.storage.endpoint_url)
    stored, precision = read_measured(storage, plan.run_id, request), measuring_precision(plan, storage)
    if stored is not None and stored.measurement.precision == precision:
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
        results = row_results(model, splits, TEST, batch_size, precision)
        _write(folder, TEST, results.queries, results.triplets)
        for name, version in request.out_of_domain.items():
            other_splits = {
                split: _with_labels(plan, storage, name, version, split) for split in ("train", "eval", TEST)
            }
            others = row_results(model, other_splits, TEST, batch_size, precision)
            _write(folder, name, others.queries, others.triplets)
        measurement = Measurement(
            request=request,
            files=upload_files(storage, folder, layout.comparison_prefix(plan.run_id, request.role.key)),
            num_corpus_texts=results.num_corpus_texts,
            seconds_per_text=results.seconds_per_text,
            precision=precision,
            num_non_finite_weights=sum(int((~values.isfinite()).sum()) for values in model.parameters()),
            num_leaked_rows=num_leaked_rows,
        )
    storage.put(layout.measured_key(plan.run_id, request.role.key), seal(measurement))


def read_measured(storage: Storage, run_id: str, request: Request) -> MeasuredModel | None:
    """Return the stored results of exactly this request; None if there are none, or if their document is damaged."""
    key = layout.measured_key(run_id, request.role.key)
    try:
        measurement = unseal(Measurement, storage.read(key), storage.uri_of(key))
    except (ObjectNotFound, CorruptObject):
        return None
    return MeasuredModel(measurement, storage, run_id) if measurement.request == request else None


def groups_of(table: pa.Table) -> list[str]:
    """Return the group of each row of such a table. Related rows share a `group`, or else an anchor."""
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
