"""A run id belongs to one recipe and to one version of each of its datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

import made
from tercet.errors import ConfigError
from tercet.manifest import publish
from tercet.report import as_json
from tercet.run import run, survey
from tercet.storage import open_storage


def test_a_run_is_not_resumed_with_another_version_of_a_mixed_dataset(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    publish(storage, made.manifest())
    publish(storage, made.mixed_manifest("docs"))
    config = made.config(storage={"uri": str(tmp_path)}, mix=[{"name": "docs"}])
    _, plan = survey(config, "mine", made.TODAY)
    assert [part.version for part in plan.datasets] == [
        made.manifest().version,
        made.mixed_manifest("docs").version,
    ]
    storage.put("runs/mine/plan.json", as_json(plan))
    publish(storage, made.mixed_manifest("docs", train=60))
    with pytest.raises(ConfigError, match="run mine exists with another dataset version"):
        run(config, "mine")
