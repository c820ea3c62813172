"""The example recipes that are installed with tercet, as package data."""

from __future__ import annotations

from pathlib import Path

RECIPES_DIR = Path(__file__).parent / "recipes"


def example_names() -> list[str]:
    """Names of the example recipes, sorted."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def example_path(name: str) -> Path:
    """Path of an example recipe on this machine, in a repository checkout as well as in an installed package."""
    return RECIPES_DIR / f"{name}.yaml"
