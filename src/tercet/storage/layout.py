"""Every key in storage: of a run, a dataset and a model. No other file builds a key, or reads names from one.

    runs/<run_id>/plan.json  the plan that the run follows
    runs/<run_id>/LEASE.json  which attempt may commit, and every attempt so far; changed by compare-and-swap alone
    runs/<run_id>/precision.json  the precision that the run chose when it began
    runs/<run_id>/forward.json  the packing and the attention kernel that the first machine chose
    runs/<run_id>/saved_form.json  the names, shapes and types of the tensors that its models are saved as
    runs/<run_id>/accumulation.json  the micro-batches per step that fit into memory, where the recipe says auto
    runs/<run_id>/events.jsonl  what happened and when, one event a line
    runs/<run_id>/incidents/<incident>.json  one thing that went wrong
    runs/<run_id>/evaluations/<step>.json  metrics on the eval split after a step
    runs/<run_id>/checkpoints/<step>/<attempt>/<file>  files of a checkpoint, each written by the rank that owns it
    runs/<run_id>/checkpoints/<step>/<attempt>/rank-<rank>.json  the files that one rank wrote, with their sha256
    runs/<run_id>/checkpoints/<step>/COMMIT  written last: without it there is no such checkpoint
    runs/<run_id>/training.json  the log of the training; written last by the workers
    runs/<run_id>/best/<file>  the best model: `SentenceTransformer(".../best")` loads it
    runs/<run_id>/best/COMMIT  written last: without it there is no best model
    runs/<run_id>/metrics.json  every measurement of the run
    runs/<run_id>/report.html  the result as a page
    runs/<run_id>/report.json  the result, also of a failed run
    runs/<run_id>/comparison/<role>/<data>-<kind>.parquet  one model's result on each row, for the gate
    runs/<run_id>/comparison/<role>/MEASURED  written last, with the sha256 of those files
    datasets/<dataset>/versions/<version>/shards/<split>-<shard>-of-<num_shards>.parquet  rows of one split
    datasets/<dataset>/versions/<version>/quarantine.jsonl  the rows that were refused, if there were any
    datasets/<dataset>/versions/<version>/manifest.json  written last: without it there is no such version
    datasets/<dataset>/HEAD.json  the newest version; changed by compare-and-swap alone
    datasets/<dataset>/mined/<version>-<mining>.json  which version holds the negatives mined for this one
    models/<model>/versions/<number>.json  a published model: its files with their sha256, and its lineage
    models/<model>/decisions/<sha256>.json  what the gate decided about a candidate, promoted or not
    models/<model>/champion.json  the version that serves; changed by compare-and-swap alone
    models/<model>/champions/<generation>.json  every champion so far, byte for byte as it was in champion.json
    models/<model>/INDEX.json  says that the next two cover every version and champion; names the newest version
    models/<model>/by_run/<run_id>.json  the versions that were published from a run
    models/<model>/served/<number>.json  this version has been the champion
    models/<model>/nights/<run_id>.json  the outcome of a night, written last
    models/<model>/told/<publisher>/<generation>.json  this publisher has been notified of this champion
    models/<model>/onnx/<number>/<file>  a published model as ONNX
    models/<model>/onnx/<number>/EXPORTED  written last, with the sha256 of those files and the metrics of both models

`PATTERNS` is this table. Names in storage outlive renames in the code: a key never changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tercet.errors import ConfigError, DataError

PATTERNS: tuple[tuple[str, str], ...] = tuple(
    (pattern, purpose)
    for line in (__doc__ or "").splitlines()
    if line.startswith("    ")
    for pattern, _, purpose in [line.strip().partition("  ")]
)
"""Every pattern of a key, `<…>` standing for one name, with its purpose."""

RUNS, DATASETS, MODELS = "runs", "datasets", "models"
"""The three folders to list."""

COMMIT = "COMMIT"
"""The name of the file that makes the files beside or below it count."""

REPORT_PAGE = "report.html"
"""The name of a run's report as a page, below the run's folder."""

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as in a recipe


# Runs


def run_prefix(run_id: str) -> str:
    """Return the folder of a run."""
    return f"{RUNS}/{run_id}"


def plan_key(run_id: str) -> str:
    """Return the key of a run's plan."""
    return f"{run_prefix(run_id)}/plan.json"


def lease_key(run_id: str) -> str:
    """Return the key of a run's lease."""
    return f"{run_prefix(run_id)}/LEASE.json"


def precision_key(run_id: str) -> str:
    """Return the key of the precision chosen for a run."""
    return f"{run_prefix(run_id)}/precision.json"


def forward_key(run_id: str) -> str:
    """Return the key of the forward pass chosen for a run."""
    return f"{run_prefix(run_id)}/forward.json"


def saved_form_key(run_id: str) -> str:
    """Return the key of how a run's models are saved."""
    return f"{run_prefix(run_id)}/saved_form.json"


def accumulation_key(run_id: str) -> str:
    """Return the key of the number of micro-batches chosen for a run."""
    return f"{run_prefix(run_id)}/accumulation.json"


def events_key(run_id: str) -> str:
    """Return the key of a run's events."""
    return f"{run_prefix(run_id)}/events.jsonl"


def incidents_prefix(run_id: str) -> str:
    """Return the folder of a run's incidents."""
    return f"{run_prefix(run_id)}/incidents"


def incident_key(run_id: str, incident: str) -> str:
    """Return the key of one incident."""
    return f"{incidents_prefix(run_id)}/{incident}.json"


def evaluation_key(run_id: str, step: int) -> str:
    """Return the key of the metrics on the eval split after `step`."""
    return f"{run_prefix(run_id)}/evaluations/{step:08d}.json"


def training_key(run_id: str) -> str:
    """Return the key of the log of a finished training."""
    return f"{run_prefix(run_id)}/training.json"


def checkpoints_prefix(run_id: str) -> str:
    """Return the folder of a run's checkpoints."""
    return f"{run_prefix(run_id)}/checkpoints"


def step_prefix(run_id: str, step: int) -> str:
    """Return the folder of one step's checkpoint, of all attempts."""
    return f"{checkpoints_prefix(run_id)}/{step:08d}"


def attempt_folder(run_id: str, step: int, attempt: str) -> str:
    """Return the folder to which one attempt writes its files of one step."""
    return f"{step_prefix(run_id, step)}/{attempt}"


def part_key(attempt_folder: str, rank: int) -> str:
    """Return the key of the document that lists the files which one rank wrote to its attempt's folder."""
    return f"{attempt_folder}/rank-{rank}.json"


def commit_key(run_id: str, step: int) -> str:
    """Return the key of the document that makes a step's checkpoint count."""
    return f"{step_prefix(run_id, step)}/{COMMIT}"


def step_of(key: str) -> int | None:
    """Return the step of the checkpoint to which a key belongs; None for foreign files beside the checkpoints."""
    _, _, _, step, *below = key.split("/")
    return int(step) if below and step.isdecimal() else None


def attempt_folder_of(key: str) -> str:
    """Return the attempt's folder to which a file of a checkpoint belongs."""
    return "/".join(key.split("/")[:5])


def is_commit(key: str) -> bool:
    """Whether a key below `checkpoints_prefix` is that of a commit."""
    return key.endswith(f"/{COMMIT}")


def best_prefix(run_id: str) -> str:
    """Return the folder of a run's best model, which `SentenceTransformer(path)` loads."""
    return f"{run_prefix(run_id)}/best"


def best_commit_key(run_id: str) -> str:
    """Return the key of the document that makes a run's best model count."""
    return f"{best_prefix(run_id)}/{COMMIT}"


def metrics_key(run_id: str) -> str:
    """Return the key of all measurements of a run."""
    return f"{run_prefix(run_id)}/metrics.json"


def report_key(run_id: str) -> str:
    """Return the key of a run's report."""
    return f"{run_prefix(run_id)}/report.json"


def report_page_key(run_id: str) -> str:
    """Return the key of a run's report as a page."""
    return f"{run_prefix(run_id)}/{REPORT_PAGE}"


def comparison_prefix(run_id: str, role: str) -> str:
    """Return the folder of one model's row results: base, candidate or champion-<generation>."""
    return f"{run_prefix(run_id)}/comparison/{role}"


def row_results_key(run_id: str, role: str, data: str, kind: str) -> str:
    """Return the key of one table of row results."""
    return f"{comparison_prefix(run_id, role)}/{data}-{kind}.parquet"


def measured_key(run_id: str, role: str) -> str:
    """Return the key of the document that makes one model's row results count."""
    return f"{comparison_prefix(run_id, role)}/MEASURED"


def run_ids(keys: Iterable[str]) -> list[str]:
    """Return the sorted ids of the runs that have a plan among the keys below `RUNS`."""
    return _names(keys, f"{RUNS}/", "/plan.json")


# Datasets


def dataset_prefix(dataset: str) -> str:
    """Return the folder of a dataset. Raises DataError for an impossible name."""
    return f"{DATASETS}/{_checked(dataset, 'dataset')}"


def head_key(dataset: str) -> str:
    """Return the key of the pointer to the newest version."""
    return f"{dataset_prefix(dataset)}/HEAD.json"


def dataset_versions_prefix(dataset: str) -> str:
    """Return the folder of a dataset's versions."""
    return f"{dataset_prefix(dataset)}/versions"


def version_prefix(dataset: str, version: str) -> str:
    """Return the folder of a version of a dataset. Raises DataError for an impossible name or version."""
    return f"{dataset_versions_prefix(dataset)}/{_checked(version, 'version')}"


def manifest_key(dataset: str, version: str) -> str:
    """Return the key of the document that makes a version of a dataset exist."""
    return f"{version_prefix(dataset, version)}/manifest.json"


def shard_path(split: str, shard: int, num_shards: int) -> str:
    """Return the path of a shard below the folder of its version."""
    return f"shards/{split}-{shard:05d}-of-{num_shards:05d}.parquet"


def quarantine_key(dataset: str, version: str) -> str:
    """Return the key of the rows that were refused while a version was built."""
    return f"{version_prefix(dataset, version)}/quarantine.jsonl"


def mined_key(into: str, source: str, mining: str) -> str:
    """Return the key, in the mined dataset `into`, of what came of version `source`; `mining` is a hash of the
    settings."""
    return f"{dataset_prefix(into)}/mined/{source}-{mining}.json"


def dataset_names(keys: Iterable[str]) -> list[str]:
    """Return the sorted names of the datasets that have a HEAD among the keys below `DATASETS`."""
    return _names(keys, f"{DATASETS}/", "/HEAD.json")


def dataset_version_ids(keys: Iterable[str], dataset: str) -> list[str]:
    """Return the sorted versions that have a manifest among the keys below `dataset_versions_prefix`."""
    return _names(keys, f"{dataset_versions_prefix(dataset)}/", "/manifest.json")


# Models


def model_prefix(model: str) -> str:
    """Return the folder of a model. Raises ConfigError for an impossible name."""
    if not _MODEL_NAME.fullmatch(model):
        raise ConfigError(f"{model!r} cannot name a model", "Use letters, digits, '.', '_' and '-', 64 at most.")
    return f"{MODELS}/{model}"


def champion_key(model: str) -> str:
    """Return the key of the pointer to the version that serves."""
    return f"{model_prefix(model)}/champion.json"


def generation_key(model: str, generation: int) -> str:
    """Return the key under which one generation of the champion is kept."""
    return f"{model_prefix(model)}/champions/{generation:08d}.json"


def model_versions_prefix(model: str) -> str:
    """Return the folder of a model's versions."""
    return f"{model_prefix(model)}/versions"


def model_version_key(model: str, number: int) -> str:
    """Return the key of a version of a model."""
    return f"{model_versions_prefix(model)}/{number:08d}.json"


def decision_key(model: str, sha256: str) -> str:
    """Return the key of a decision of the gate, by the sha256 of its document."""
    return f"{model_prefix(model)}/decisions/{sha256}.json"


def index_key(model: str) -> str:
    """Return the key of the document saying that versions by run, and versions that served, are indexed."""
    return f"{model_prefix(model)}/INDEX.json"


def versions_of_run_key(model: str, run_id: str) -> str:
    """Return the key of the document that names the versions published from a run."""
    return f"{model_prefix(model)}/by_run/{run_id}.json"


def served_key(model: str, number: int) -> str:
    """Return the key that says: this version has been the champion."""
    return f"{model_prefix(model)}/served/{number:08d}.json"


def nights_prefix(model: str) -> str:
    """Return the folder of a model's nights."""
    return f"{model_prefix(model)}/nights"


def night_key(model: str, run_id: str) -> str:
    """Return the key of the outcome of a night."""
    return f"{nights_prefix(model)}/{run_id}.json"


def notification_key(model: str, publisher: str, generation: int) -> str:
    """Return the key of the document saying that a publisher was notified of a champion."""
    return f"{model_prefix(model)}/told/{publisher}/{generation:08d}.json"


def onnx_prefix(model: str, number: int) -> str:
    """Return the folder of a version of a model as ONNX."""
    return f"{model_prefix(model)}/onnx/{number:08d}"


def exported_key(model: str, number: int) -> str:
    """Return the key of the document that makes an ONNX export count."""
    return f"{onnx_prefix(model, number)}/EXPORTED"


def model_names(keys: Iterable[str]) -> list[str]:
    """Return the sorted names of the models that have a version among the keys below `MODELS`."""
    published = (re.match(rf"{MODELS}/([^/]+)/versions/", key) for key in keys)
    return sorted({match[1] for match in published if match})


def model_version_numbers(keys: Iterable[str], model: str) -> list[int]:
    """Return the sorted numbers of the versions among the keys below `model_versions_prefix`; foreign files are
    skipped."""
    names = _names(keys, f"{model_versions_prefix(model)}/", ".json")
    return sorted(int(name) for name in names if name.isdecimal())


def night_run_ids(keys: Iterable[str], model: str) -> list[str]:
    """Return the sorted run ids of the nights among the keys below `nights_prefix`."""
    return _names(keys, f"{nights_prefix(model)}/", ".json")


def _names(keys: Iterable[str], prefix: str, suffix: str) -> list[str]:
    between = (key[len(prefix) : -len(suffix)] for key in keys if key.startswith(prefix) and key.endswith(suffix))
    return sorted(name for name in between if name and "/" not in name)


def _checked(name: str, what: str) -> str:
    if not _DATASET_NAME.fullmatch(name):
        raise DataError(f"{name!r} cannot name a {what}", "Use letters, digits, '.', '_' and '-', 128 at most.")
    return name
