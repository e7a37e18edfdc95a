"""Cohorts: the stretches of a data set's rows that lie in one tar each, found in a concatenated index by bisection."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FULL_CHECK_ROWS = 1_000_000  # up to here every row is looked at when a data set is opened (a few milliseconds)


class Misfit(ValueError):
    """An index that does not fit its tars; the message goes on from the index's name."""


@dataclass(frozen=True)
class Cohort:
    """Rows that follow each other and lie in one tar."""

    name: str
    tar: Path
    rows: range


def is_concatenated(entries: np.ndarray) -> bool:
    """Whether the entries say which cohort each row is of."""
    return "cohort_index" in (entries.dtype.names or ())


def cohorts_of(entries: np.ndarray, tars: Mapping[str, Path]) -> tuple[Cohort, ...]:
    """The rows of every cohort, in O(log N) each; `tars` is in the order of the cohorts' index.

    Raises `Misfit` for cohorts without a name, and for rows that are not sorted by cohort (of more than a million rows,
    when it shows). The bisection is Python's, because numpy's would copy the whole column.
    """
    if not is_concatenated(entries):
        return tuple(Cohort(name, tar, range(len(entries))) for name, tar in tars.items())
    column = entries["cohort_index"]
    if len(column) <= FULL_CHECK_ROWS and len(falls := np.flatnonzero(column[1:] < column[:-1])):
        raise unsorted(entries, int(falls[0]) + 1)
    edges = [bisect_left(column, index) for index in range(len(tars) + 1)]
    if (beyond := edges[-1]) < len(column):
        raise Misfit(f"says that row {beyond} is of cohort {column[beyond]}, but only {len(tars)} cohorts have names")
    stretches = map(range, edges[:-1], edges[1:])
    return tuple(Cohort(name, tar, rows) for (name, tar), rows in zip(tars.items(), stretches, strict=True))


def unsorted(entries: np.ndarray, row: int) -> Misfit:
    """What to raise for a row that lies among those of another cohort."""
    return Misfit(f"is not sorted by cohort: row {row} of cohort {entries['cohort_index'][row]} lies among others")
