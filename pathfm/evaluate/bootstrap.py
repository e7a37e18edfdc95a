"""Intervals by resampling: how often every unit is drawn, and what the spread of a number over resamples is.

U units: samples, pictures, or groups of them   R resamples
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pathfm.random_streams import stream

_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Score:
    """A number, and the 95 % percentile interval that its bootstrap over test samples or their groups gives."""

    value: float
    low: float
    high: float


def draws(num_units: int, resamples: Sequence[int], seed: int) -> Float[np.ndarray, "U R"]:
    """How often each unit is drawn in the resamples of these numbers. Each resample has a stream of its own."""
    counts = [
        np.bincount(stream(seed, number, "bootstrap").integers(0, num_units, num_units), minlength=num_units)
        for number in resamples
    ]
    return np.ascontiguousarray(np.array(counts, dtype=float).reshape(-1, num_units).T)


def score_of(value: float, drawn: Float[np.ndarray, " R"]) -> Score:
    """`drawn`: the number of every resample; nan where one has none, which does not count. All nan: the value twice."""
    defined = drawn[~np.isnan(drawn)]
    low, high = np.percentile(defined, _PERCENTILES) if len(defined) else (value, value)
    return Score(value, float(low), float(high))


def ratio(part: Float[np.ndarray, "*n"], whole: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """nan where the whole is nothing."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def mean_of_defined(values: Float[np.ndarray, "L R"]) -> Float[np.ndarray, " R"]:
    """Over the first axis, without what is nan; nan where all is."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(0), defined.sum(0).astype(float))
