"""Whether samples can be decoded, and which of them are the same bytes."""

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import numpy as np
from jaxtyping import Int64, Shaped

from pathfm.data.datasets import Dataset
from pathfm.data.decode import DecodeError
from pathfm.data.verification.findings import Check, first_cases
from pathfm.errors import UserError
from pathfm.log import progress

_DIGEST_BYTES = 16  # of blake2b: no two of 10^9 different samples will meet
_ROWS_AHEAD, _BYTES_AHEAD = 1024, 256 << 20  # being decoded at most, and as much being fetched
_COPIES_SHOWN = 3  # of each group of them

Decoder = Callable[[bytes], object]  # raises DecodeError

# S samples that were read   B of them together


@dataclass(frozen=True)
class ReadSamples:
    """What reading some samples showed."""

    rows: Int64[np.ndarray, " S"]
    digests: Shaped[np.ndarray, " S"]  # of the encoded bytes
    undecodable: dict[int, str]  # row -> reason


def read_samples(dataset: Dataset, rows: Int64[np.ndarray, " S"], decoder: Decoder) -> ReadSamples:
    """Read, hash and decode samples, the latter on all cores. Memory grows by 24 bytes a sample."""
    digests = np.empty(len(rows), f"V{_DIGEST_BYTES}")
    undecodable: dict[int, str] = {}
    results = progress(_hashed_and_decoded(dataset, rows, decoder), "decoding", total=len(rows), unit="samples")
    for place, (digest, reason) in enumerate(results):
        digests[place] = digest
        if reason:
            undecodable[int(rows[place])] = reason
    return ReadSamples(rows, digests, undecodable)


def _hashed_and_decoded(
    dataset: Dataset, rows: Int64[np.ndarray, " S"], decoder: Decoder
) -> Iterator[tuple[bytes, str]]:
    """The disk fetches the next samples while these are decoded."""
    blocks = chain([rows[:0]], _blocks(dataset, rows), [rows[:0]])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for block, following in pairwise(blocks):
            encoded = [_read(dataset, row) for row in block.tolist()]
            dataset.will_need(following.tolist())
            yield from pool.map(partial(_hash_and_decode, decoder), encoded)


def _blocks(dataset: Dataset, rows: Int64[np.ndarray, " S"]) -> Iterator[Int64[np.ndarray, " B"]]:
    """Rows that are read together: few of them where samples are large."""
    for begin in range(0, len(rows), _ROWS_AHEAD):
        entries = dataset.entries[block := rows[begin : begin + _ROWS_AHEAD]]
        parts = np.cumsum(entries["end_offset"] - entries["start_offset"]) // _BYTES_AHEAD
        yield from np.split(block, np.flatnonzero(np.diff(parts)) + 1)


def _read(dataset: Dataset, row: int) -> bytes | UserError:
    """The encoded sample, or why the disk does not give it back: one bad sector must not hide what else is found."""
    try:
        return dataset.read_bytes(row)
    except UserError as error:
        return error


def _hash_and_decode(decoder: Decoder, encoded: bytes | UserError) -> tuple[bytes, str]:
    """The digest, and why the sample cannot be decoded (nothing when it can)."""
    if isinstance(encoded, UserError):
        return os.urandom(_DIGEST_BYTES), str(encoded)  # like no other
    digest = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()
    try:
        decoder(encoded)
    except DecodeError as error:
        return digest, str(error)
    return digest, ""


def check_decoding(dataset: Dataset, samples: ReadSamples) -> list[Check]:
    """One check for each cohort with undecodable samples, or one that all is well."""
    how_many = f"{len(samples.rows):,} of {len(dataset):,} samples read"
    if not samples.undecodable:
        return [Check("decoding", "ok", f"{how_many}, every one can be decoded")]
    damaged: dict[str, list[int]] = {}
    for row in samples.undecodable:
        damaged.setdefault(dataset.cohort_of(row), []).append(row)
    return [
        Check(
            "decoding",
            "damage",
            f"cohort {cohort}: {len(rows):,} cannot be decoded ({how_many})",
            first_cases(f"{dataset.name_of(row)} (row {row}): {samples.undecodable[row]}" for row in rows),
        )
        for cohort, rows in damaged.items()
    ]


def check_duplicates(dataset: Dataset, samples: ReadSamples) -> Check:
    """Samples that are byte for byte another sample, among those that were read."""
    _, first, group_of, sizes = np.unique(samples.digests, return_index=True, return_inverse=True, return_counts=True)
    num_repeats = len(samples.rows) - len(first)
    if not num_repeats:
        return Check("duplicates", "ok", f"none among the {len(samples.rows):,} samples read")
    grouped, ends, several = samples.rows[np.argsort(group_of, kind="stable")], np.cumsum(sizes), sizes > 1
    groups = map(slice, (ends - sizes)[several].tolist(), ends[several].tolist())
    cases = first_cases(_as_case(dataset, grouped[group].tolist()) for group in groups)
    said = f"{num_repeats:,} of the {len(samples.rows):,} samples read are copies of another one"
    return Check("duplicates", "warning", said, cases)


def _as_case(dataset: Dataset, copies: list[int]) -> str:
    """The first of them by name: of empty glass there may be thousands."""
    shown = " = ".join(f"{dataset.name_of(row)} (row {row})" for row in copies[:_COPIES_SHOWN])
    more = len(copies) - _COPIES_SHOWN
    return shown + (f" and {more:,} more" if more > 0 else "")
