"""Which sample lies at which position: a keyed permutation of every epoch, as arithmetic. No list, no state, any N."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from pathfm.errors import UserError
from pathfm.random_streams import stream

_ROUNDS = 8  # of the Feistel network; small domains (few bits per half) need more than the classical four
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finaliser


class SampleOrder:
    """Position p lies in epoch p // N; each epoch visits every sample once, in an order of its own.

    A Feistel network permutes the smallest power of two >= N under the epoch's key; results outside of N are fed
    back until they fall inside (cycle walking), which leaves a permutation of N.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise UserError("there are no samples to order")
        self.epoch_size = num_samples
        self.seed = seed
        bits = (num_samples - 1).bit_length()
        self._left_bits, self._right_bits = bits // 2, bits - bits // 2

    def samples(self, positions: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
        """The sample (row of the data set) at each position >= 0, int64. The same in every process, in any order."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.epoch_size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            samples[in_epoch] = self._permuted(places[in_epoch].astype(np.uint64), int(epoch))
        return samples

    def _permuted(self, places: np.ndarray, epoch: int) -> np.ndarray:
        keys = _round_keys(self.seed, epoch)
        result = self._feistel(places, keys)
        outside = np.flatnonzero(result >= self.epoch_size)
        while len(outside):
            result[outside] = self._feistel(result[outside], keys)
            outside = outside[result[outside] >= self.epoch_size]
        return result.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: tuple[np.uint64, ...]) -> np.ndarray:
        """A permutation of [0, 2^bits). The halves may differ by a bit, so they take turns instead of swapping."""
        right_bits = np.uint64(self._right_bits)
        left_mask, right_mask = np.uint64((1 << self._left_bits) - 1), np.uint64((1 << self._right_bits) - 1)
        left, right = values >> right_bits, values & right_mask
        for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
            left = left ^ (_mixed(right ^ left_key) & left_mask)
            right = right ^ (_mixed(left ^ right_key) & right_mask)
        return (left << right_bits) | right


@dataclass(frozen=True)
class BatchPlan:
    """Which positions a rank reads at a step: its contiguous share of the global batch."""

    global_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        batch, ranks = self.global_batch_size, self.world_size
        if batch < 1 or batch % ranks:
            below, above = batch // ranks * ranks, -(-max(batch, 1) // ranks) * ranks
            nearest = f"{below} or {above}" if below > 0 else str(above)
            raise UserError(f"a global batch of {batch} cannot be shared equally by {ranks} ranks; take {nearest}")

    @property
    def rank_batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    def positions(self, step: int) -> Int[np.ndarray, " B"]:
        """Global positions of this rank's samples at a step, int64."""
        first = step * self.global_batch_size + self.rank * self.rank_batch_size
        return np.arange(first, first + self.rank_batch_size, dtype=np.int64)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    keys = stream(seed, epoch, "sample order").integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    return tuple(keys)


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 bits in, 64 well-mixed bits out (splitmix64's finaliser; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))
