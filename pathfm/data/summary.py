"""What is in a data set: cohorts, classes, bytes, image formats."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pathfm.data.datasets import Dataset
from pathfm.data.decode import open_image
from pathfm.data.fit import spread
from pathfm.data.labels import class_counts

_NUM_WEIGHED = 1_000_000  # rows whose bytes are counted
_NUM_LOOKED_AT = 256  # samples whose image headers are read


@dataclass(frozen=True)
class CohortSummary:
    """The part of a data set that lies in one tar."""

    tar: Path
    num_samples: int
    median_bytes: int


@dataclass(frozen=True)
class Summary:
    """For people."""

    num_samples: int
    cohorts: Mapping[str, CohortSummary]
    classes: Mapping[str, int]  # name -> samples
    sample_bytes: tuple[int, int, int]  # smallest, median, largest
    total_bytes: int  # of all samples; from those that were weighed when there are more
    num_weighed: int
    images: Mapping[str, int]  # e.g. "JPEG RGB 256 x 256" -> how many of those looked at
    index_command: str


def summarise(dataset: Dataset) -> Summary:
    """Look at the whole index and at a few samples' headers."""
    weighed = spread(len(dataset), _NUM_WEIGHED)
    sizes = _sample_bytes(dataset, weighed)
    return Summary(
        num_samples=len(dataset),
        cohorts={name: _cohort(dataset, rows) for name, rows in dataset.cohorts.items() if rows},
        classes=class_counts(dataset),
        sample_bytes=(int(sizes.min()), int(np.median(sizes)), int(sizes.max())),
        total_bytes=round(float(sizes.mean()) * len(dataset)),
        num_weighed=len(weighed),
        images=_images(dataset),
        index_command=dataset.index_command,
    )


def _cohort(dataset: Dataset, rows: range) -> CohortSummary:
    weighed = rows.start + spread(len(rows), _NUM_WEIGHED // len(dataset.cohorts))
    return CohortSummary(dataset.tar_of(rows[0]), len(rows), int(np.median(_sample_bytes(dataset, weighed))))


def _sample_bytes(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    entries = dataset.entries[rows]
    return (entries["end_offset"] - entries["start_offset"]).astype(np.int64)


def _images(dataset: Dataset) -> Mapping[str, int]:
    """The kinds of images, the most frequent first."""
    rows = spread(len(dataset), _NUM_LOOKED_AT).tolist()
    dataset.will_need(rows)
    return dict(Counter(_kind_of(dataset.read_bytes(row)) for row in rows).most_common())


def _kind_of(encoded: bytes) -> str:
    """By the header alone; nothing is decoded."""
    try:
        with open_image(encoded) as image:
            return f"{image.format} {image.mode} {image.width} x {image.height}"
    except Exception:  # Pillow's plugins raise whatever damaged bytes lead them to
        return "no readable image"
