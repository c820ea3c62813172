"""Whether the rows that are new look as if their labels were right: a model that does not know them, on them and on
the test rows from before.

A gate cannot see poison that is in its own test rows: all models fall alike. But the old rows do not fall with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tercet.data.cache import cache_dir_of, load_split
from tercet.data.versions import read_manifest
from tercet.evaluation.measurement import TEST, Measurement, groups_of, read_table
from tercet.planning.plan import TrainPlan
from tercet.storage import Storage

# A warning a night that is none is soon read by nobody: of 1,000 nights without a difference, one warns.
MAX_P = 0.001
# New rows may well be a little harder: other topics, and the old ones were tuned on.
MIN_FALL = 0.1
MIN_GROUPS = 5


def label_warning(storage: Storage, plan: TrainPlan, before: str | None, measured: Measurement) -> str | None:
    """A warning for a person about the test rows that `before`, an earlier version of the dataset, does not have; None
    where there is nothing to say. measured: a model that was not trained on the new rows."""
    table = read_table(storage, plan.run_id, measured, TEST, "queries")
    if before is None or table is None:
        return None
    manifest = read_manifest(storage, plan.datasets[0].name, before)
    known = set(load_split(storage, manifest, TEST, cache_dir_of(plan.config.workers), ["anchor"])["anchor"])
    is_new = np.array([anchor not in known for anchor in table["anchor"].to_pylist()], dtype=np.bool_)
    return warning("ndcg@10", table["ndcg@10"].to_numpy(), groups_of(table), is_new)


def warning(
    metric: str, values: npt.NDArray[np.float64], groups: Sequence[str], is_new: npt.NDArray[np.bool_]
) -> str | None:
    """Pure. Welch's one-sided test on the means of groups, whose rows are alike."""
    from scipy.stats import ttest_ind

    names = np.asarray(groups, dtype=np.str_)
    new, old = (_group_means(values[mask], names[mask]) for mask in (is_new, ~is_new))
    if min(len(new), len(old)) < MIN_GROUPS:
        return None
    fall = float(old.mean() - new.mean())
    if fall < MIN_FALL:
        return None
    # Rows that are all alike have no variance, and leave nothing to test.
    p = 0.0 if new.std() == old.std() == 0.0 else float(ttest_ind(new, old, equal_var=False, alternative="less").pvalue)
    if p >= MAX_P:
        return None
    return (
        f"{int(is_new.sum()):,} test rows are new, and the model from before does far worse on them: {metric} "
        f"{new.mean():.4f}, on the others {old.mean():.4f} (means of groups, p = {p:.1g}). Are their labels right? "
        "`tercet datasets rollback` takes a version back."
    )


def _group_means(values: npt.NDArray[np.float64], groups: npt.NDArray[np.str_]) -> npt.NDArray[np.float64]:
    _, number = np.unique(groups, return_inverse=True)
    means: npt.NDArray[np.float64] = np.bincount(number, weights=values) / np.bincount(number)
    return means
