"""Imports the machine-learning libraries, and keeps their notices out of the log."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import warnings

logger = logging.getLogger("tercet")


def import_quietly() -> None:
    """Import the libraries, silence their progress bars and notices, and send tercet's log to standard output.

    With many workers, the notices would drown what matters. Errors still show."""
    _import_libraries()
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


@functools.cache
def _import_libraries() -> None:
    """Import the libraries without garbage collection, which takes a quarter of the time: what they create stays.

    Cached, because a second call would also freeze garbage of the run before."""
    gc.disable()
    import torch

    # accelerate imports DeepSpeed if it is installed. Without this, each process would log that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import sentence_transformers  # noqa: F401

    gc.freeze()
    gc.enable()
