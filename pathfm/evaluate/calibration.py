"""Which classes are taken for which, and whether a probability means what it says.

T test samples   C classes   B bins of confidence, the probability of the class that is predicted
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_BINS = 15  # "On Calibration of Modern Neural Networks", arXiv 1706.04599


def confusion(probabilities: Float[np.ndarray, "T C"], labels: Int[np.ndarray, " T"]) -> Int[np.ndarray, "C C"]:
    """How many samples of each class (row) are predicted as each (column); of equal probabilities the first counts."""
    counts = np.zeros((probabilities.shape[1],) * 2, np.int64)
    np.add.at(counts, (labels, probabilities.argmax(1)), 1)
    return counts


@dataclass(frozen=True)
class Reliability:
    """Samples by their confidence, in bins of equal width: (0, 1/B], (1/B, 2/B], ... A mean is nan in an empty bin."""

    counts: Int[np.ndarray, " B"]
    confidence: Float[np.ndarray, " B"]  # mean
    accuracy: Float[np.ndarray, " B"]

    @property
    def expected_error(self) -> float:
        """Mean over samples of their bin's |accuracy - confidence| (arXiv 1706.04599, eq. 3)."""
        there = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[there]
        return float(np.average(gaps, weights=self.counts[there]))


def reliability(
    probabilities: Float[np.ndarray, "T C"], labels: Int[np.ndarray, " T"], bins: int = _BINS
) -> Reliability:
    """T >= 1."""
    confidence = probabilities.max(1).astype(np.float64)
    hit = probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights=values, minlength=bins) for values in (confidence, hit))
    means = [np.divide(total, counts, out=np.full(bins, np.nan), where=counts > 0) for total in sums]
    return Reliability(counts, *means)
