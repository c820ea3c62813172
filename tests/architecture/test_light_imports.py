"""What answers at once does not import what takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import builders
from tercet.data.versions import publish
from tercet.storage import open_storage

HEAVY = ["torch", "ray", "sentence_transformers", "transformers", "datasets", "pyarrow", "s3fs", "fsspec"]
HEAVY += ["huggingface_hub", "accelerate", "deepspeed", "pandas", "botocore", "aiohttp"]


def imported_by(code: str) -> set[str]:
    """Which heavy packages (numpy among them) a fresh process has after `code`."""
    show = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1])) & {*HEAVY, "numpy"}


@pytest.mark.parametrize(
    "name",
    [
        "errors",
        "storage",
        "config.recipe",
        "data.manifest",
        "data.versions",
        "artifacts.report",
        "artifacts.decision",
        "artifacts.champion",
        "artifacts.registry",
        "planning.model_files",
        "planning.packing",
        "cli.main",
    ],
)
def test_files_that_import_nothing_heavy(name: str) -> None:
    assert imported_by(f"import tercet.{name}") == set()


@pytest.mark.parametrize(
    "name",
    [
        "data.order",
        "data.build",
        "artifacts.checkpoint",
        "planning.plan",
        "cluster.train",
        "cluster.jobs",
        "pipeline.run",
        "cli.demo_data",
    ],
)
def test_files_that_import_numpy_at_most(name: str) -> None:
    assert imported_by(f"import tercet.{name}") <= {"numpy"}


def test_torch_is_for_workers_alone() -> None:
    """Driver and controller would import it one after the other, before the first worker starts."""
    ray = (
        "import os; os.environ['RAY_TRAIN_V2_ENABLED'] = '1'\n"
        "import tercet.cluster.policies, tercet.cluster.process_group"
    )
    found = imported_by(ray)
    assert "ray" in found
    assert "torch" not in found
    assert "torch" in imported_by(f"{ray}\ntercet.cluster.process_group._import()")


def call(*arguments: str) -> str:
    return (
        "import contextlib, io\nfrom tercet.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    assert main({list(arguments)!r}) == 0"
    )


def test_help_imports_nothing() -> None:
    assert imported_by(call("--help")) == set()
    assert imported_by(call("train", "--help")) == set()


def test_plan_imports_numpy_alone(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    publish(open_storage(store), builders.manifest())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\nstorage: {{uri: {store}}}\ndataset: {{name: poems}}\nmodel: {{name_or_path: someone/model}}\n"
        "loss: {name: TripletLoss}\n"
    )
    assert imported_by(call("plan", str(recipe))) <= {"numpy"}
    assert imported_by(call("datasets", "list", "--storage", store)) == set()
    assert imported_by(call("runs", "list", "--storage", store)) <= {"numpy"}
    assert imported_by(call("models", "list", "--storage", store)) == set()
