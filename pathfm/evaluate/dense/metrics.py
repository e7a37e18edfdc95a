"""Scores of maps against what is true, from amounts that add up over pixels; intervals by resampling pictures.

C classes   H, W size in px   U units that are resampled: pictures, or groups of them   K amounts that add up
R resamples
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from pathfm.errors import UserError
from pathfm.evaluate.bootstrap import Score, draws, mean_of_defined, ratio, score_of
from pathfm.evaluate.dense.losses import IGNORED, is_known

Amounts = Float[np.ndarray, "R K"]
Measure = Callable[[Amounts], Mapping[str, Float[np.ndarray, " R"]]]
_POWERS = (1, 2, 3)  # of 1.25, how far a number may be off


def confusion(truth: Int[Tensor, "H W"], predicted: Int[Tensor, "H W"], classes: int) -> Int[np.ndarray, "C C"]:
    """Pixels by true class (row) and predicted class (column); ignored pixels are in none."""
    counts = truth != IGNORED
    pairs = truth[counts].long() * classes + predicted[counts].long()
    return pairs.bincount(minlength=classes**2).view(classes, classes).cpu().numpy()


def deviations(truth: Float[Tensor, "H W"], predicted: Float[Tensor, "H W"]) -> Float[np.ndarray, " K"]:
    """Of pixels with a known value: their number, the sums of |p - t| / t and (p - t)^2, and how many are within
    a factor of 1.25, 1.25^2 and 1.25^3.
    """
    counts = is_known(truth)
    true, said = truth[counts].double().cpu().numpy(), predicted[counts].double().cpu().numpy()
    off = said - true
    factor = np.maximum(said / true, true / np.maximum(said, 1e-12))
    within = [(factor < 1.25**power).sum() for power in _POWERS]
    return np.array([len(true), (np.abs(off) / true).sum(), (off**2).sum(), *within], dtype=float)


def segmentation_scores(
    confusions: Int[np.ndarray, "U C C"],
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """All from one confusion matrix, that of all pixels together.

    pixel_acc  the share of pixels whose class was said            miou, mdice  means over classes
    iou/NAME   true positives / (true positives + false positives + false negatives)
    dice/NAME  2 true positives / (2 true positives + false positives + false negatives)
    acc/NAME   the share of the class's pixels that were said to be of it

    A class that is neither there nor said has no IoU and no Dice, and is left out of the means.
    """
    classes = len(names)

    def measure(amounts: Amounts) -> dict[str, Float[np.ndarray, " R"]]:
        matrix = amounts.reshape(-1, classes, classes)
        hit, true, said = matrix.diagonal(axis1=1, axis2=2), matrix.sum(2), matrix.sum(1)
        iou, dice, acc = ratio(hit, true + said - hit), ratio(2 * hit, true + said), ratio(hit, true)
        overall = {
            "miou": mean_of_defined(iou.T),
            "mdice": mean_of_defined(dice.T),
            "pixel_acc": ratio(hit.sum(1), true.sum(1)),
        }
        of_classes = {"iou": iou, "dice": dice, "acc": acc}
        return overall | {
            f"{what}/{name}": values[:, number]
            for number, name in enumerate(names)
            for what, values in of_classes.items()
        }

    return with_intervals(
        confusions.reshape(len(confusions), classes**2), measure, groups, resamples=resamples, seed=seed
    )


def regression_scores(
    amounts: Float[np.ndarray, "U K"], groups: Sequence[str] | None = None, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Over all pixels with a known value: abs_rel, the mean of |p - t| / t; rmse; delta_n, the share within 1.25^n."""

    def measure(amounts: Amounts) -> dict[str, Float[np.ndarray, " R"]]:
        number, relative, squares, *within = amounts.T
        deltas = {f"delta_{power}": ratio(part, number) for power, part in zip(_POWERS, within, strict=True)}
        return {"abs_rel": ratio(relative, number), "rmse": np.sqrt(ratio(squares, number)), **deltas}

    return with_intervals(amounts, measure, groups, resamples=resamples, seed=seed)


def with_intervals(
    amounts: Float[np.ndarray, "U K"],
    measure: Measure,
    groups: Sequence[str] | None = None,
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Score]:
    """Metrics of all units together, with 95 % percentile intervals over resamples of the units.

    With `groups`, one name for each unit, whole groups are drawn: pictures of one field or patient are not independent.
    A metric that is not defined is left out, and a resample in which it is not is left out of its interval.
    Raises `UserError` when there are no units.
    """
    if not len(amounts):
        raise UserError("there is no test picture to score; give a test split that has some")
    drawn_from = _summed(amounts.astype(float), groups)
    values = measure(drawn_from.sum(0, keepdims=True))
    drawn = measure(draws(len(drawn_from), range(resamples), seed).T @ drawn_from)
    return {name: score_of(float(value[0]), drawn[name]) for name, value in values.items() if not np.isnan(value[0])}


def _summed(amounts: Float[np.ndarray, "U K"], groups: Sequence[str] | None) -> Float[np.ndarray, "G K"]:
    if groups is None:
        return amounts
    names, of_group = np.unique(np.array(groups), return_inverse=True)
    sums = np.zeros((len(names), amounts.shape[1]))
    np.add.at(sums, of_group, amounts)
    return sums
