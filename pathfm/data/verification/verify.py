"""Whether data sets can be trusted: indices against tars, samples, labels, and what must not be in two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pathfm.data.datasets import Dataset, open_dataset
from pathfm.data.fit import spread
from pathfm.data.labels import class_counts
from pathfm.data.verification.findings import Check, Verdict, worst
from pathfm.data.verification.rows import CheckedRows, check_rows
from pathfm.data.verification.samples import Decoder, ReadSamples, check_decoding, check_duplicates, read_samples
from pathfm.data.verification.slides import SlideNames
from pathfm.data.verification.splits import check_shared_bytes, check_slides
from pathfm.errors import UserError
from pathfm.log import warnings_kept


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify, and how thoroughly."""

    datasets: Sequence[str]  # data set strings; several are to share nothing
    num_decoded: int | None  # samples of each that are read, spread over it; None: all
    slide_names: SlideNames
    decoder_of: Callable[[Dataset], Decoder]  # what its samples are decoded with


@dataclass(frozen=True)
class Verification:
    """What was found, by data set string, and between every two data sets."""

    checks: Mapping[str, Sequence[Check]]

    @property
    def verdict(self) -> Verdict:
        return worst(check for checks in self.checks.values() for check in checks)


def verify(request: VerifyRequest) -> Verification:
    """Check every data set and, when there are several, that they share nothing."""
    checks: dict[str, Sequence[Check]] = {}
    opened: dict[str, _Opened] = {}
    for text in request.datasets:
        try:
            with warnings_kept() as warnings:
                dataset = open_dataset(text)
        except UserError as error:
            checks[text] = [Check("index", "damage", str(error))]
            continue
        opened[text] = found = _look_through(dataset, request)
        checks[text] = [*(Check("index", "warning", warning) for warning in warnings), *_checks_of(found)]
    for one, other in combinations(opened, 2):
        checks[f"{one} and {other}"] = _between(opened[one], opened[other], guessed=request.slide_names.is_guess)
    return Verification(checks)


@dataclass(frozen=True)
class _Opened:
    """A data set that could be opened, and what a look at its tars and samples showed."""

    dataset: Dataset
    rows: CheckedRows
    samples: ReadSamples


def _look_through(dataset: Dataset, request: VerifyRequest) -> _Opened:
    rows = check_rows(dataset, request.slide_names if len(request.datasets) > 1 else None)
    to_read = spread(len(dataset), len(dataset) if request.num_decoded is None else request.num_decoded)
    to_read = np.setdiff1d(to_read, rows.misplaced)
    return _Opened(dataset, rows, read_samples(dataset, to_read, request.decoder_of(dataset)))


def _checks_of(found: _Opened) -> list[Check]:
    checks = [*found.rows.checks, *_check_labels(found.dataset)]
    if len(found.samples.rows):
        checks += [*check_decoding(found.dataset, found.samples), check_duplicates(found.dataset, found.samples)]
    return checks


def _between(one: _Opened, other: _Opened, *, guessed: bool) -> list[Check]:
    checks = []
    if one.rows.slides and other.rows.slides:
        checks.append(check_slides(one.rows.slides, other.rows.slides, guessed=guessed))
    if len(one.samples.rows) and len(other.samples.rows):
        checks.append(check_shared_bytes((one.dataset, other.dataset), (one.samples, other.samples)))
    return checks


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
