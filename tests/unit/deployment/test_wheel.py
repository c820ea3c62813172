"""The wheel carries its data, and works in a folder that is not the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.commands import REPOSITORY
from tercet.errors import DataError

WHEEL = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel, built from a copy of what it is made of."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, *WHEEL, "--wheel-dir", folder, source], check=True, timeout=300)
    (wheel,) = folder.glob("tercet-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def tercet(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command line in `folder`; nothing of the repository is on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-P", "-m", "tercet.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_example_recipe_is_printed_and_read(site: Path, tmp_path: Path) -> None:
    printed = tercet(site, tmp_path, "recipe")
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "my.yaml").write_text(printed.stdout)
    planned = tercet(site, tmp_path, "plan", "my.yaml")
    assert planned.returncode == DataError.exit_code, planned.stderr  # only the dataset is missing
    assert "no dataset 'my-triplets'" in planned.stderr


def test_the_demo_finds_its_recipe(site: Path, tmp_path: Path) -> None:
    shown = tercet(site, tmp_path, "demo", "--help")
    assert shown.returncode == 0, shown.stderr
    assert str(site / "tercet/config/recipes/demo.yaml") in "".join(shown.stdout.split())


def test_the_schema_is_in_the_wheel(site: Path, tmp_path: Path) -> None:
    packaged = (site / "tercet/config/recipes/recipe.schema.json").read_text()
    assert tercet(site, tmp_path, "schema").stdout == packaged


def test_the_licence_is_in_the_wheel(site: Path) -> None:
    (metadata,) = site.glob("tercet-*.dist-info/METADATA")
    assert "License-Expression: Apache-2.0\n" in metadata.read_text()
    assert (metadata.parent / "licenses/LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
