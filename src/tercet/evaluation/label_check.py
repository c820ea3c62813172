"""Do the labels of new rows look right? A model that was not trained on them is compared on new and old test rows.

The gate cannot see bad labels in its own test rows, because all models do worse on them. But no model does worse on the
old rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tercet.data.cache import cache_dir_of, load_split
from tercet.data.versions import read_manifest
from tercet.evaluation.measurement import TEST, MeasuredModel, groups_of
from tercet.planning.plan import TrainPlan

# A warning that cries wolf every night is soon ignored. This is one false warning in 1,000 nights.
MAX_P = 0.001
# New rows may well be a little harder: they have other topics, and the model was tuned on the old ones.
MIN_FALL = 0.1
MIN_GROUPS = 5


def label_warning(plan: TrainPlan, before: str | None, model: MeasuredModel) -> str | None:
    """Return a warning about the test rows that are new since version `before` of the dataset, or None.

    model: one that was not trained on the new rows. Raises ObjectNotFound and CorruptObject."""
    table = model.table(TEST, "queries")
    if before is None or table is None:
        return None
    manifest = read_manifest(model.storage, plan.datasets[0].name, before)
    known = set(load_split(model.storage, manifest, TEST, cache_dir_of(plan.config.workers), ["anchor"])["anchor"])
    is_new = np.array([anchor not in known for anchor in table["anchor"].to_pylist()], dtype=np.bool_)
    return warning("ndcg@10", table["ndcg@10"].to_numpy(), groups_of(table), is_new)


def warning(
    metric: str, values: npt.NDArray[np.float64], groups: Sequence[str], is_new: npt.NDArray[np.bool_]
) -> str | None:
    """Return a warning if the metric is far lower on new rows. Pure.

    values, groups, is_new: one a row. Rows of a group are alike, so Welch's one-sided test compares means of groups."""
    from scipy.stats import ttest_ind

    names = np.asarray(groups, dtype=np.str_)
    new, old = (_group_means(values[mask], names[mask]) for mask in (is_new, ~is_new))
    if min(len(new), len(old)) < MIN_GROUPS:
        return None
    fall = float(old.mean() - new.mean())
    if fall < MIN_FALL:
        return None
    # Without any variance there is nothing to test.
    p = 0.0 if new.std() == old.std() == 0.0 else float(ttest_ind(new, old, equal_var=False, alternative="less").pvalue)
    if p >= MAX_P:
        return None
    return (
        f"{int(is_new.sum()):,} test rows are new, and a model that was not trained on the new data does far worse on "
        f"them: {metric} {new.mean():.4f}, but {old.mean():.4f} on the other rows (means of groups, p = {p:.1g}). "
        "Are their labels right? `tercet datasets rollback` returns to an earlier version of the dataset."
    )


def _group_means(values: npt.NDArray[np.float64], groups: npt.NDArray[np.str_]) -> npt.NDArray[np.float64]:
    _, number = np.unique(groups, return_inverse=True)
    means: npt.NDArray[np.float64] = np.bincount(number, weights=values) / np.bincount(number)
    return means
