"""The same tiny models and storage as in the flow tests."""

from __future__ import annotations

from support.commands import cache_dir, environment, store, tiny_model_dir, triplets_file

__all__ = ["cache_dir", "environment", "store", "tiny_model_dir", "triplets_file"]
