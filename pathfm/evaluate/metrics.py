"""Accuracy, balanced accuracy and AUC of class probabilities, each with its bootstrap interval over test samples.

Tiles of one slide are alike, so an interval over tiles is too narrow: where groups (slides, patients) are known, whole
groups are drawn.

T test samples   C classes   P the samples of a class   L classes that have samples   G groups
R resamples: each is a column of weights, how often it drew every sample
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pathfm.errors import UserError
from pathfm.evaluate.bootstrap import Score, draws, mean_of_defined, ratio, score_of

_WEIGHTS_AT_ONCE = 2**18  # 2 MiB: a few such arrays stay in a core's cache


_Measured = dict[str, Float[np.ndarray, " R"]]  # every metric of every resample; nan where it has none


def scores(
    probabilities: Float[Tensor, "T C"],
    labels: Int[Tensor, " T"],
    *,
    groups: Int[Tensor, " T"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """`acc`, `balanced_acc` and `auc`, in float64 on the CPU wherever the tensors are.

    acc           the share of samples whose most probable class is theirs; of equal ones the first counts
    balanced_acc  the mean over classes of their samples' accuracy
    auc           the mean over classes of the ROC area of that class against all others, by that class's probability.
                  With C = 2 both areas are one number, and the second class's is taken.

    A class without samples, in the labels or in a resample, is left out of both means. Where all samples are of one
    class there is no area: then `auc` is missing, and a resample of that kind is left out of its interval.
    `groups`: a number for the group of each sample; a resample draws G groups, each with all its samples.
    Without resamples an interval is its value twice. Raises `UserError` when there are no samples.
    """
    return mean_scores([probabilities], labels, groups=groups, resamples=resamples, seed=seed)


def mean_scores(
    tries: Sequence[Float[Tensor, "T C"]],
    labels: Int[Tensor, " T"],
    *,
    groups: Int[Tensor, " T"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """The mean of `scores` over several classifiers of the same samples, as few-shot tries are.

    Every resample is of all of them at once, so the interval tells of the test samples, not of what was drawn to learn.
    """
    benches = _benches(tries, labels)
    return _bootstrapped(lambda weights: _mean_of(benches, weights), _groups_of(labels, groups), resamples, seed)


def differences(
    one: Sequence[Float[Tensor, "T C"]],
    other: Sequence[Float[Tensor, "T C"]],
    labels: Int[Tensor, " T"],
    *,
    groups: Int[Tensor, " T"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """By how much `one` scores higher than `other` on the same samples, as mean over the tries of each.

    Both are measured on the same resamples, so what makes a resample easy or hard for both does not widen the interval.
    """
    sides = _benches(one, labels), _benches(other, labels)

    def difference(weights: Float[np.ndarray, "T R"]) -> _Measured:
        first, second = (_mean_of(benches, weights) for benches in sides)
        return {name: first[name] - second[name] for name in first}

    return _bootstrapped(difference, _groups_of(labels, groups), resamples, seed)


@dataclass(frozen=True)
class _Ranking:
    """Samples in falling order of one class's probability, and where equal ones to each of the class's P samples lie.

    The last group of equal samples, often those with probability 0, is left out of `order`: what it adds up to is all.
    """

    order: Int[np.ndarray, " n"]
    own: Int[np.ndarray, " P"]  # the class's samples
    first: Int[np.ndarray, " P"]  # how many are more probable
    last: Int[np.ndarray, " P"]  # how many are more or equally probable; n + 1 stands for all

    @classmethod
    def of(cls, probability: Float[np.ndarray, " T"], is_own: Bool[np.ndarray, " T"]) -> "_Ranking":
        order = np.argsort(-probability, kind="stable")
        falling, own = -probability[order], np.flatnonzero(is_own)
        first = np.searchsorted(falling, -probability[own], side="left")
        last = np.searchsorted(falling, -probability[own], side="right")
        n = int(np.searchsorted(falling, falling[-1], side="left"))
        return cls(order[:n], own, first, np.minimum(last, n + 1))

    def area(self, weights: Float[np.ndarray, "T R"]) -> Float[np.ndarray, " R"]:
        """ROC area: the share of (own, other) pairs in which the own sample is more probable; equal ones count half.

        Of each own sample the weight above it and half of that beside it is summed up. This counts every pair of own
        samples as well, in both orders, which is half the square of their weight; the rest are the lost pairs.
        """
        total = weights.sum(0)
        above = np.empty((len(self.order) + 2, weights.shape[1]))
        above[0], above[-1] = 0, total
        np.cumsum(weights[self.order], axis=0, out=above[1:-1])
        of_own = weights[self.own]
        own = of_own.sum(0)
        lost = np.einsum("pr,pr->r", above[self.first] + above[self.last], of_own) / 2 - own**2 / 2
        return 1 - ratio(lost, own * (total - own))


@dataclass(frozen=True)
class _Bench:
    """What every resample is measured with."""

    hit: Float[np.ndarray, " T"]  # 1 or 0
    by_class: Int[np.ndarray, " T"]  # samples in the order of their classes
    starts: Int[np.ndarray, " L"]  # where in it each class begins
    rankings: Sequence[_Ranking]

    @classmethod
    def of(cls, probabilities: Float[np.ndarray, "T C"], labels: Int[np.ndarray, " T"]) -> "_Bench":
        present, starts = np.unique(np.sort(labels), return_index=True)
        judged = present if probabilities.shape[1] > 2 else present[-1:]
        return cls(
            (probabilities.argmax(1) == labels).astype(float),
            np.argsort(labels, kind="stable"),
            starts,
            [_Ranking.of(probabilities[:, label], labels == label) for label in judged],
        )

    def measure(self, weights: Float[np.ndarray, "T R"]) -> _Measured:
        hit = weights * self.hit[:, None]
        of_classes = np.add.reduceat(weights[self.by_class], self.starts)
        hit_of_classes = np.add.reduceat(hit[self.by_class], self.starts)
        areas = np.stack([ranking.area(weights) for ranking in self.rankings])
        return {
            "acc": hit.sum(0) / weights.sum(0),
            "balanced_acc": mean_of_defined(ratio(hit_of_classes, of_classes)),
            "auc": mean_of_defined(areas),
        }


def _benches(tries: Sequence[Float[Tensor, "T C"]], labels: Int[Tensor, " T"]) -> list[_Bench]:
    if not len(labels):
        raise UserError("there is no test sample to score; give a test split that has some")
    assert all(0 <= labels.min() <= labels.max() < one.shape[1] for one in tries), "labels name columns"
    return [_Bench.of(one.detach().cpu().double().numpy(), labels.cpu().numpy()) for one in tries]


def _mean_of(benches: Sequence[_Bench], weights: Float[np.ndarray, "T R"]) -> _Measured:
    """Whether a resample has a metric depends on labels alone, so it is nan for all or none."""
    measured = [bench.measure(weights) for bench in benches]
    return {name: np.mean([found[name] for found in measured], axis=0) for name in measured[0]}


def _groups_of(labels: Int[Tensor, " T"], groups: Int[Tensor, " T"] | None) -> Int[np.ndarray, " T"]:
    """0..G-1; without groups every sample is its own."""
    if groups is None:
        return np.arange(len(labels))
    assert len(groups) == len(labels), "each sample has one group"
    return np.unique(groups.cpu().numpy(), return_inverse=True)[1]


def _bootstrapped(
    measure: Callable[[Float[np.ndarray, "T R"]], _Measured], groups: Int[np.ndarray, " T"], resamples: int, seed: int
) -> dict[str, Score]:
    values = measure(np.ones((len(groups), 1)))
    drawn = [measure(weights) for weights in _resampled(groups, resamples, seed)]
    return {
        name: score_of(float(value[0]), np.concatenate([*(of_chunk[name] for of_chunk in drawn), []]))
        for name, value in values.items()
        if not np.isnan(value[0])
    }


def _resampled(groups: Int[np.ndarray, " T"], resamples: int, seed: int) -> Iterator[Float[np.ndarray, "T R"]]:
    """Weights of all resamples, some at a time: how many come at once changes none."""
    num_groups = int(groups.max()) + 1
    at_once = max(1, _WEIGHTS_AT_ONCE // len(groups))
    for start in range(0, resamples, at_once):
        yield draws(num_groups, range(start, min(start + at_once, resamples)), seed)[groups]
