"""Whether data sets can be trusted: indices against tars, samples, labels, and what must not be in two of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pathfm.data.check_rows import check_rows
from pathfm.data.check_samples import ReadSamples, check_decoding, check_duplicates, read_samples
from pathfm.data.check_splits import check_shared_bytes, check_slides
from pathfm.data.datasets import Dataset, open_dataset
from pathfm.data.findings import Check, Verdict, worst
from pathfm.data.fit import spread
from pathfm.data.labels import class_counts
from pathfm.data.slides import SlideNames
from pathfm.errors import UserError
from pathfm.log import warnings_kept


@dataclass(frozen=True)
class Verification:
    """What was found, by data set string, and between every two data sets."""

    checks: Mapping[str, Sequence[Check]]

    @property
    def verdict(self) -> Verdict:
        return worst(check for checks in self.checks.values() for check in checks)


@dataclass(frozen=True)
class _Verified:
    """One data set that could be opened."""

    dataset: Dataset
    checks: list[Check]
    slides: dict[str, str]
    samples: ReadSamples


def verify(texts: Sequence[str], num_decoded: int | None, slide_names: SlideNames) -> Verification:
    """Check every data set that a string names and, when there are several, that they share nothing.

    `num_decoded` samples of each are read, spread over it; None: all.
    """
    checks: dict[str, Sequence[Check]] = {}
    verified: dict[str, _Verified] = {}
    for text in texts:
        try:
            with warnings_kept() as warnings:
                dataset = open_dataset(text)
        except UserError as error:
            checks[text] = [Check("index", "damage", str(error))]
            continue
        found = _verify(dataset, warnings, num_decoded, slide_names if len(texts) > 1 else None)
        verified[text], checks[text] = found, found.checks
    for one, other in combinations(verified, 2):
        checks[f"{one} and {other}"] = _between(verified[one], verified[other], guessed=slide_names.is_guess)
    return Verification(checks)


def _verify(
    dataset: Dataset, warnings: Sequence[str], num_decoded: int | None, slide_names: SlideNames | None
) -> _Verified:
    rows = check_rows(dataset, slide_names)
    to_read = spread(len(dataset), len(dataset) if num_decoded is None else num_decoded)
    samples = read_samples(dataset, np.setdiff1d(to_read, rows.misplaced))
    checks = [Check("index", "warning", warning) for warning in warnings]
    checks += rows.checks
    if len(samples.rows):
        checks += [*check_decoding(dataset, samples), check_duplicates(dataset, samples)]
    checks += _check_labels(dataset)
    return _Verified(dataset, checks, rows.slides, samples)


def _check_labels(dataset: Dataset) -> list[Check]:
    """How many samples each class has; nothing for a data set without labels."""
    counts = class_counts(dataset)
    if len(counts) < 2:
        return []
    if empty := tuple(name for name, number in counts.items() if not number):
        said = f"{len(empty)} of {len(counts)} classes have no samples"
        return [Check("labels", "warning", said, empty, counts)]
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    said = f"{len(counts)} classes, from {counts[fewest]:,} samples ({fewest}) to {counts[most]:,} ({most})"
    return [Check("labels", "ok", said, counts=counts)]


def _between(one: _Verified, other: _Verified, *, guessed: bool) -> list[Check]:
    checks = []
    if one.slides and other.slides:
        checks.append(check_slides(one.slides, other.slides, guessed=guessed))
    if len(one.samples.rows) and len(other.samples.rows):
        checks.append(check_shared_bytes((one.dataset, other.dataset), (one.samples, other.samples)))
    return checks
