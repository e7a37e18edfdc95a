"""Random numbers asked for by name: a stream depends on (seed, position, name) and on nothing else.

A worker, a rank and a rerun that name the same stream draw the same numbers, and no stream disturbs another.
Philox is counter-based: the name and the seed make the key, the position sits in the counter's upper half,
so the 2^128 numbers of one position never reach the next position's.
"""

import hashlib
from functools import lru_cache

import numpy as np


def stream(seed: int, position: int, name: str) -> np.random.Generator:
    """The generator of all draws called `name` for the sample (or step) at `position`, 0 <= position < 2^63."""
    assert position >= 0, position
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, name), counter=counter))


def derived_seed(seed: int, position: int, name: str) -> int:
    """A 63-bit seed for a library that wants an integer (torch.manual_seed), keyed like `stream`."""
    return int(stream(seed, position, name).integers(0, 2**63))


@lru_cache(maxsize=256)
def _key(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
