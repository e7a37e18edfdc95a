"""What data sets share that are to share nothing, as query and test: slides by file name, samples by content."""

from collections.abc import Mapping

import numpy as np

from pathfm.data.datasets import Dataset
from pathfm.data.verification.findings import Check, first_cases
from pathfm.data.verification.samples import ReadSamples


def check_slides(one: Mapping[str, str], other: Mapping[str, str], *, guessed: bool) -> Check:
    """`one`, `other`: slide -> the first of its files. `guessed`: by the default rule."""
    shared = sorted(one.keys() & other.keys())
    slide, file = next(iter(one.items()))
    example = f"(taken for a slide: '{slide}' of {file})"
    if not shared:
        return Check("slides", "ok", f"none of {len(one):,} and {len(other):,} is in both {example}")
    if guessed and len(one) == len(other) == 1:
        said = f"all names give the one slide '{slide}', so nothing is known; tell slides apart with --slide REGEX"
        return Check("slides", "warning", said)
    said = f"{len(shared):,} of {len(one):,} and {len(other):,} slides are in both {example}"
    cases = first_cases(f"{slide}: {one[slide]} and {other[slide]}" for slide in shared)
    return Check("slides", "leakage", said, cases)


def check_shared_bytes(datasets: tuple[Dataset, Dataset], samples: tuple[ReadSamples, ReadSamples]) -> Check:
    """Samples that are byte for byte in both, among those that were read of each."""
    one, other = samples
    shared, first, second = np.intersect1d(one.digests, other.digests, return_indices=True)
    how_many = f"of the {len(one.rows):,} and {len(other.rows):,} samples read"
    if not len(shared):
        return Check("bytes", "ok", f"none {how_many} are in both")
    pairs = zip(one.rows[first].tolist(), other.rows[second].tolist(), strict=True)
    cases = first_cases(f"{datasets[0].name_of(a)} = {datasets[1].name_of(b)}" for a, b in sorted(pairs))
    return Check("bytes", "leakage", f"{len(shared):,} {how_many} are in both", cases)
