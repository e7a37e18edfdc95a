"""A picture of a data set: some tiles of every class, or of every cohort."""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int64
from PIL import Image

from pathfm.data.datasets import KNN, Dataset
from pathfm.data.decode import DecodeError, decode
from pathfm.data.fit import spread
from pathfm.data.labels import distinct_names
from pathfm.sheets import captioned, in_columns, paper, stacked

_SIDE = 112  # pixels of a tile
_COLUMNS = 8  # tiles beside each other
_NUM_TILES = 64  # of all groups together, as far as each has room for a few
_FEWEST = 4  # tiles of a group


def contact_sheet(dataset: Dataset) -> Image.Image:
    """Tiles spread evenly over every class of a KNN data set, over every cohort of another.

    Few groups have many tiles each, in rows of eight; many groups have four each, two groups in a row.
    """
    groups = _groups(dataset)
    per_group = max(_FEWEST, _NUM_TILES // len(groups) // _COLUMNS * _COLUMNS)
    columns = min(per_group, _COLUMNS)
    blocks = []
    for name, rows in groups.items():
        shown = [int(rows[place]) for place in spread(len(rows), per_group).tolist()]
        blocks.append((f"{name}, {len(rows):,} samples", _grid(dataset, shown, columns)))
    beside = _COLUMNS // columns
    return stacked([captioned(blocks[first : first + beside]) for first in range(0, len(blocks), beside)])


def _groups(dataset: Dataset) -> Mapping[str, range | Int64[np.ndarray, " rows"]]:
    """Name -> rows, of the groups that have any."""
    groups: dict[str, range | np.ndarray] = dict(dataset.cohorts)
    if isinstance(dataset, KNN):
        classes = (np.flatnonzero(dataset.labels == label) for label in range(len(dataset.class_labels)))
        groups = dict(zip(distinct_names(dataset), classes, strict=True))
    return {name: rows for name, rows in groups.items() if len(rows)}


def _grid(dataset: Dataset, rows: list[int], columns: int) -> Image.Image:
    dataset.will_need(rows)
    tiles = [_thumbnail(dataset.read_bytes(row)) for row in rows]
    return in_columns([*tiles, *_fillers(columns - len(tiles))], columns)


def _fillers(number: int) -> Iterator[Image.Image]:
    """So that a group with few tiles is as wide as the others."""
    return (paper(_SIDE, _SIDE) for _ in range(number))


def _thumbnail(encoded: bytes) -> Image.Image:
    """In the middle of a square; a black one stands for an image that cannot be decoded."""
    try:
        tile = Image.fromarray(decode(encoded))
    except DecodeError:
        return Image.new("RGB", (_SIDE, _SIDE), "black")
    tile.thumbnail((_SIDE, _SIDE))
    square = paper(_SIDE, _SIDE)
    square.paste(tile, ((_SIDE - tile.width) // 2, (_SIDE - tile.height) // 2))
    return square
