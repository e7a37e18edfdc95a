"""Keyed permutations of [0, n) as arithmetic: no list, no state, any n; every value may have an n and a key of its own.

A Feistel network permutes the smallest power of two >= n under the key; results outside of [0, n) are fed back until
they fall inside (cycle walking), which leaves a permutation of [0, n).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import UInt64

from pathfm.random_streams import stream

# P values  R rounds
_ROUNDS = 8  # small domains (few bits per half) need more than the classical four
_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64 (Steele et al. 2014), and its finaliser's factors:
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(
    values: UInt64[np.ndarray, " P"], sizes: UInt64[np.ndarray, " P"], keys: UInt64[np.ndarray, "R P"]
) -> UInt64[np.ndarray, " P"]:
    """Where each value of [0, size) goes under its key. One size and one key may stand for all: shapes [1], [R 1]."""
    bits = _bits(sizes)
    result = _feistel(values, bits, keys)
    outside = np.flatnonzero(result >= sizes)
    while len(outside):
        result[outside] = _feistel(result[outside], _at(outside, bits), _at(outside, keys))
        outside = outside[result[outside] >= _at(outside, sizes)]
    return result


def keys_of(seed: int, permutations: Sequence[tuple[str, int]]) -> UInt64[np.ndarray, "R K"]:
    """The keys, one in each column, of permutations that go by a name and a number."""
    keys = [_round_keys(seed, name, number) for name, number in permutations]
    return np.array(keys, np.uint64).reshape(-1, _ROUNDS).T


def stepped(keys: UInt64[np.ndarray, "R P"], steps: UInt64[np.ndarray, " P"]) -> UInt64[np.ndarray, "R P"]:
    """The keys of the step-th of a series of permutations: splitmix64's numbers from each key on."""
    return _mixed(keys + steps * _STEP)


@lru_cache(maxsize=256)
def _round_keys(seed: int, name: str, number: int) -> tuple[int, ...]:
    return tuple(stream(seed, number, name).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64).tolist())


def _bits(sizes: np.ndarray) -> np.ndarray:
    """Bits of the largest value of each domain, exactly."""
    different, places = np.unique(sizes, return_inverse=True)
    return np.array([(int(size) - 1).bit_length() for size in different], np.uint64)[places]


def _at(places: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The columns of a table at some places; the one column that stands for all stays as it is."""
    return table if table.shape[-1] == 1 else table[..., places]


def _feistel(values: np.ndarray, bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits). The halves may differ by a bit, so they take turns instead of swapping."""
    left_bits = bits >> np.uint64(1)
    right_bits = bits - left_bits
    left_mask, right_mask = ((np.uint64(1) << half) - np.uint64(1) for half in (left_bits, right_bits))
    left, right = values >> right_bits, values & right_mask
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ (_mixed(right ^ left_key) & left_mask)
        right = right ^ (_mixed(left ^ right_key) & right_mask)
    return (left << right_bits) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """64 bits in, 64 well-mixed bits out (splitmix64's finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))
