"""Which sample lies at which position: a keyed permutation of every epoch, as arithmetic. No list, no state, any N."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int

from pathfm.data.permutation import keys_of, permuted
from pathfm.errors import UserError


class Order(Protocol):
    """Says which sample (row of the data set) lies at a position."""

    @property
    def epoch_size(self) -> int:
        """How many positions an epoch has."""

    def samples(self, positions: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """The sample at each position >= 0, int64. The same in every process, in any company."""


class SampleOrder:
    """Position p lies in epoch p // N; each epoch visits every sample once, in an order of its own."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise UserError("there are no samples to order")
        self.epoch_size = num_samples
        self.seed = seed

    def samples(self, positions: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """The sample at each position >= 0, int64. The same in every process, in any company."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.epoch_size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            samples[in_epoch] = self._permuted(places[in_epoch].astype(np.uint64), epoch)
        return samples

    def _permuted(self, places: np.ndarray, epoch: int) -> np.ndarray:
        size, key = np.array([self.epoch_size], np.uint64), keys_of(self.seed, [("sample order", epoch)])
        return permuted(places, size, key)


@dataclass(frozen=True)
class BatchPlan:
    """Which positions a rank reads of a batch: its contiguous share of the global batch, in equal consecutive parts."""

    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    parts: int = 1  # that the rank's share passes the network in, one after the other

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        batch, ranks = self.global_batch_size, self.world_size
        if batch < 1 or batch % ranks:
            below, above = batch // ranks * ranks, -(-max(batch, 1) // ranks) * ranks
            nearest = f"{below} or {above}" if below > 0 else str(above)
            raise UserError(f"a global batch of {batch} cannot be shared equally by {ranks} ranks; take {nearest}")
        assert self.rank_batch_size % self.parts == 0, self

    @property
    def rank_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    def positions(self, batch: int, part: int = 0) -> Int[np.ndarray, " B"]:
        """Global positions of this rank's samples in a part of a batch, int64."""
        size = self.rank_batch_size // self.parts
        first = batch * self.global_batch_size + self.rank * self.rank_batch_size + part * size
        return np.arange(first, first + size, dtype=np.int64)


BatchRange = tuple[int, int]  # the first batch, and the one behind the last


def batch_of_step(step: int, passed_over: Iterable[BatchRange]) -> int:
    """Which batch of the order an optimiser step (from 0) takes, when these ranges of batches are left out."""
    batch = step
    for first, behind in merged(passed_over):
        if first <= batch:
            batch += behind - first
    return batch


def merged(ranges: Iterable[BatchRange]) -> list[BatchRange]:
    """The same batches in ranges that are sorted and do not touch."""
    apart: list[BatchRange] = []
    for first, behind in sorted(ranges):
        if apart and first <= apart[-1][1]:
            apart[-1] = (apart[-1][0], max(behind, apart[-1][1]))
        else:
            apart.append((first, behind))
    return apart
