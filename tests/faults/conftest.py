"""What whole runs share."""

from flow.conftest import cache_dir, environment, store, tiny_model_dir, triplets_file

__all__ = ["cache_dir", "environment", "store", "tiny_model_dir", "triplets_file"]
