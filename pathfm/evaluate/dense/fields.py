"""Which pictures were cut from one field: those whose edges go on in each other.

N pictures   H, W size in px
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

# A step over a seam is as large as one beside it: at most 1.1 times, on the pictures of the Data Science Bowl 2018,
# where the best of pictures that do not adjoin reaches 2.1.
_MOST_OF_A_STEP = 1.6
_LEAST_STEP = 0.5  # grey levels; edges more even than this fit each other by chance


def fields(images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[int]:
    """The number of each picture's field, 0.. in the order of their first pictures.

    Two pictures of one height are of one field when the right edge of one goes on in the left edge of the other, or
    two of one width, downwards. Crops that overlap, or lie apart in their field, are not found.
    """
    field = list(range(len(images)))
    across = _pairs([image[:, -2:] for image in images], [image[:, :2] for image in images])
    turned = [image.transpose(1, 0, 2) for image in images]
    down = _pairs([image[:, -2:] for image in turned], [image[:, :2] for image in turned])
    for one, other in across + down:
        low, high = sorted((field[one], field[other]))
        field = [low if number == high else number for number in field]
    order = {number: place for place, number in enumerate(dict.fromkeys(field))}
    return [order[number] for number in field]


def _pairs(
    ends: Sequence[UInt8[np.ndarray, "H 2 3"]], beginnings: Sequence[UInt8[np.ndarray, "H 2 3"]]
) -> list[tuple[int, int]]:
    """Which end goes on in which beginning, of those that are as long."""
    found = []
    for length in sorted({len(end) for end in ends}):
        numbers = np.array([number for number, end in enumerate(ends) if len(end) == length])
        last = np.stack([ends[number] for number in numbers]).astype(float)
        first = np.stack([beginnings[number] for number in numbers]).astype(float)
        found += [(int(numbers[a]), int(numbers[b])) for a, b in np.argwhere(_go_on(last, first)) if a != b]
    return found


def _go_on(last: Float[np.ndarray, "N H 2 3"], first: Float[np.ndarray, "N H 2 3"]) -> Bool[np.ndarray, "N N"]:
    usual_before = np.abs(last[:, :, 1] - last[:, :, 0]).mean((1, 2))
    usual_behind = np.abs(first[:, :, 1] - first[:, :, 0]).mean((1, 2))
    usual = (usual_before[:, None] + usual_behind[None]) / 2
    seams = np.stack([np.abs(end[None] - first[:, :, 0]).mean((1, 2)) for end in last[:, :, 1]])
    is_telling = (usual_before[:, None] >= _LEAST_STEP) & (usual_behind[None] >= _LEAST_STEP)
    return is_telling & (seams <= _MOST_OF_A_STEP * usual)
