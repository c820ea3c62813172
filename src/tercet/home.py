"""`~` in a path that a person wrote."""

from __future__ import annotations

from pathlib import Path

from tercet.errors import ConfigError


def expand_home(path: str | Path) -> Path:
    """`~/x` and `~name/x` as the shell takes them. Raises ConfigError for a user whom this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: this machine knows no home folder of that user", hint="write it in full") from None
