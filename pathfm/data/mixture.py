"""Weighted cohorts inside the same keyed order: how much an epoch takes of each and which rows, as arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from pathfm.data.order import SampleOrder
from pathfm.data.permutation import keys_of, permuted, stepped
from pathfm.errors import UserError, listed, nearest


@dataclass(frozen=True)
class Share:
    """What an epoch takes of a cohort."""

    cohort: str
    first_row: int
    num_rows: int
    num_draws: int  # in an epoch; less than num_rows: some rows wait, more: some come again


def shares_of(
    cohorts: Mapping[str, range], weights: Mapping[str, float] | None = None, cap: int | None = None
) -> tuple[Share, ...]:
    """The cohorts that take part. A cohort of n rows and weight w (1 unless given) gives min(round(w n), cap) draws.

    Raises `UserError` for a cohort that is not there, a weight too small for a single draw, and when none is left.
    """
    weights = weights or {}
    if unknown := [name for name in weights if name not in cohorts]:
        near = "".join(f"; did you mean '{name}'?" for name in nearest(unknown[0], cohorts))
        raise UserError(f"train.cohorts: the data set has no cohort '{unknown[0]}'{near}; there are: {listed(cohorts)}")
    shares = [
        Share(name, rows.start, len(rows), _num_draws(name, len(rows), weights.get(name, 1.0), cap))
        for name, rows in cohorts.items()
    ]
    taking_part = tuple(share for share in shares if share.num_draws)
    if not taking_part:
        raise UserError("train.cohorts leaves no cohort to train on; weigh one of them above 0")
    return taking_part


def _num_draws(cohort: str, num_rows: int, weight: float, cap: int | None) -> int:
    num_draws = round(weight * num_rows)
    if weight and num_rows and not num_draws:
        raise UserError(
            f"train.cohorts: with weight {weight:g}, cohort {cohort} gives none of its {num_rows} samples to an epoch; "
            f"weigh it {1 / num_rows:.2g} or more, or 0 to leave it out"
        )
    return num_draws if cap is None else min(num_draws, cap)


class MixedOrder:
    """An epoch takes its share of every cohort, all shuffled together.

    The places of an epoch are permuted as in `SampleOrder`. A place falls into a cohort's stretch of the epoch, say as
    its j-th, and so is draw t = epoch x share + j of the cohort in the run. Draws go round and round the cohort's rows;
    where the epochs cut a round, each round is permuted by a key of its own, so that the part of it that comes into an
    epoch is spread over the cohort. Hence after any number of epochs the rows of a cohort have been drawn equally
    often, give or take one; and with weights of 1 the order is exactly that of `SampleOrder`.
    """

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self.epoch_size = sum(share.num_draws for share in shares)
        self._places = SampleOrder(self.epoch_size, seed)
        self._keys = keys_of(seed, [(f"order of cohort {share.cohort}", 0) for share in shares])
        self._first_rows = np.array([share.first_row for share in shares], np.int64)
        self._num_rows = np.array([share.num_rows for share in shares], np.int64)
        self._num_draws = np.array([share.num_draws for share in shares], np.int64)
        self._ends = np.cumsum(self._num_draws)  # of the cohorts' stretches of an epoch

    def samples(self, positions: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """The sample at each position >= 0, int64. The same in every process, in any company."""
        epochs, places = np.asarray(positions, np.int64) // self.epoch_size, self._places.samples(positions)
        cohorts = np.searchsorted(self._ends, places, side="right")
        num_draws, num_rows = self._num_draws[cohorts], self._num_rows[cohorts]
        # No overflow: a cohort's draws so far are never more than the positions so far.
        draws = epochs * num_draws + places - (self._ends[cohorts] - num_draws)
        rounds, rows = np.divmod(draws, num_rows)
        if (cut := num_draws % num_rows != 0).any():
            rows[cut] = self._permuted(rows[cut], cohorts[cut], rounds[cut])
        return self._first_rows[cohorts] + rows

    def _permuted(self, rows: np.ndarray, cohorts: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        """Rows of cohorts under the key of (cohort, round)."""
        keys = stepped(self._keys[:, cohorts], rounds.astype(np.uint64))
        return permuted(rows.astype(np.uint64), self._num_rows[cohorts].astype(np.uint64), keys)
