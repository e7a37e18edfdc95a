"""Labelled samples dealt into folds, so that what is chosen on one fold was not learned from the same slide or patient.

N samples   C classes   F folds
"""

import numpy as np
from jaxtyping import Int

from pathfm.errors import UserError
from pathfm.random_streams import stream


def folds_by_group(
    labels: Int[np.ndarray, " N"], groups: Int[np.ndarray, " N"], num_folds: int, seed: int
) -> Int[np.ndarray, " N"]:
    """The fold of each sample, 0..F-1; a group lies in one fold. Fewer groups than `num_folds` make fewer folds.

    Groups are dealt out from the largest to the smallest (equal ones in random order), each to the fold in which it
    makes the shares of every class most even. Raises `UserError` when there is but one group.
    """
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError(
            "all query samples are of one group; two are needed to choose settings on one that was held out"
        )
    num_folds = min(num_folds, len(names))
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (group_of, labels), 1)
    shares = counts / np.maximum(counts.sum(0), 1)
    shuffled = stream(seed, 0, "folds").permutation(len(names))
    held, sizes = np.zeros((num_folds, shares.shape[1])), np.zeros(num_folds)
    fold_of = np.empty(len(names), np.int64)
    for group in shuffled[np.argsort(-counts[shuffled].sum(1), kind="stable")]:
        # By how much the sum of squared shares grows: least where they are even. Of equal folds the smallest.
        growth = (2 * held * shares[group] + shares[group] ** 2).sum(1)
        fold = int(np.lexsort((sizes, growth))[0])
        held[fold] += shares[group]
        sizes[fold] += counts[group].sum()
        fold_of[group] = fold
    return fold_of[group_of]
