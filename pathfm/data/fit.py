"""Whether an index fits its tars, from file sizes and a few headers: milliseconds for any number of rows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from pathfm.data.cohorts import FULL_CHECK_ROWS, Cohort, Misfit, is_concatenated, unsorted
from pathfm.data.entries import CohortTar, SideCar
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import listed
from pathfm.log import get_logger

_log = get_logger(__name__)
_MAX_SPOT_CHECKS_PER_TAR = 16
_MAX_SPOT_CHECKS = 64  # of all tars together


def demand_fit(
    entries: np.ndarray,
    cohorts: Sequence[Cohort],
    described: Mapping[str, SideCar | CohortTar | None],
    tars: Mapping[Path, os.stat_result],
) -> None:
    """Raises `Misfit` when the tars are not those that were indexed; warns of a tar of another date.

    `described`: by cohort, what the side-car knows of its tar and rows, where there is one. `tars`: what the disk says
    of the tars of all cohorts that have rows.
    """
    found = [(cohort, said) for cohort in cohorts if (said := described.get(cohort.name))]
    if copied := [cohort.tar for cohort, said in found if not _is_as_described(cohort, said, tars)]:
        _log.warning("not as old as its index says: copied, or made again since? %s", listed(map(str, copied)))
    filled = [cohort for cohort in cohorts if cohort.rows]
    for cohort in filled:
        _demand_within(entries, cohort, tars[cohort.tar].st_size)
    checked = [filled[place] for place in spread(len(filled), _MAX_SPOT_CHECKS)]
    for cohort in checked:
        _demand_headers(entries, cohort, min(_MAX_SPOT_CHECKS_PER_TAR, _MAX_SPOT_CHECKS // len(checked)))


def _is_as_described(cohort: Cohort, said: SideCar | CohortTar, tars: Mapping[Path, os.stat_result]) -> bool:
    """False: the tar is of another date. Raises `Misfit` for other rows and another size."""
    if said.num_entries != len(cohort.rows):
        raise Misfit(f"has {len(cohort.rows)} rows, but its side-car counts {said.num_entries}, of {said.tar}")
    if not cohort.rows:
        return True
    status = tars[cohort.tar]
    if said.tar_size_bytes != status.st_size:
        raise Misfit(
            f"is the index of another tar: {said.tar} had {said.tar_size_bytes} bytes, "
            f"{cohort.tar} has {status.st_size}"
        )
    return said.tar_mtime_ns == status.st_mtime_ns


def _demand_within(entries: np.ndarray, cohort: Cohort, size: int) -> None:
    """The cohort ends within its tar: every row of a small index is looked at, the last one in a big one."""
    rows = cohort.rows if len(entries) <= FULL_CHECK_ROWS else cohort.rows[-1:]
    last = int(entries["end_offset"][rows.start : rows.stop].max())
    if last > size:
        raise Misfit(
            f"reaches to byte {last}, but {cohort.tar} ends at byte {size}: the tar is cut, "
            "or the index is of another tar"
        )


def _demand_headers(entries: np.ndarray, cohort: Cohort, num_checks: int) -> None:
    """Before the data of some rows there is a tar header that gives their size."""
    tar = TarWalk(cohort.tar)
    for row in (cohort.rows[place] for place in spread(len(cohort.rows), num_checks)):
        if is_concatenated(entries) and entries["cohort_index"][row] != entries["cohort_index"][cohort.rows[0]]:
            raise unsorted(entries, row)
        start, end = int(entries["start_offset"][row]), int(entries["end_offset"][row])
        header = tar.header_of(start)
        if header is None or header.end_offset != end:
            raise Misfit(
                f"is the index of another tar: row {row} says bytes {start} to {end}, "
                f"but no file of {cohort.tar} lies there"
            )


def spread(length: int, at_most: int) -> Int64[np.ndarray, " places"]:
    """Up to `at_most` places of `length`, evenly, the first and the last among them."""
    return np.linspace(0, length - 1, min(length, at_most)).astype(np.int64)
