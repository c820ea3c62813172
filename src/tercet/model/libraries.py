"""What a worker process prints: tercet's own lines, and not the notices of six libraries, which are imported here."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import warnings

logger = logging.getLogger("tercet")


def import_quietly() -> None:
    """One process in many: the libraries' progress bars and notices would drown what matters. Errors still show."""
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
    """What is imported stays. Looking for garbage in it, again and again, is a quarter of a worker's imports.

    Once a process: garbage of a run before would be kept with the rest."""
    gc.disable()
    import torch

    # accelerate imports DeepSpeed wherever it is installed, which else says in each process that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import sentence_transformers  # noqa: F401

    gc.freeze()
    gc.enable()
