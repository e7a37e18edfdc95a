"""From an item to its patches, row-major over its grid: decoded, cut, and padded with white where that is allowed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from pathfm.data.decode import DecodeError, decode
from pathfm.data.entries import printable
from pathfm.data.image_files import ImageFiles
from pathfm.errors import UserError, listed
from pathfm.features.items import NO_IMAGE, Item, OtherSizes

_WHITE = 255


@dataclass(frozen=True)
class Geometry:
    """Of a square region on its patches, in px. A tile is a region of one patch."""

    region_size: int
    patch_size: int
    other_sizes: OtherSizes = "refuse"

    @property
    def side(self) -> int:
        """Patches beside each other."""
        return self.region_size // self.patch_size

    def check(self) -> None:
        """Raises `UserError` when a region is not a whole number of patches."""
        if self.patch_size < 1 or self.region_size < self.patch_size or self.region_size % self.patch_size:
            raise UserError(
                f"a region of {self.region_size} px is not a whole number of {self.patch_size} px patches; "
                "choose other --region-size and --patch-size"
            )


class Patches(NamedTuple):
    """The patches of an item, views of its pixels, and what has to be noted about it."""

    pixels: Sequence[UInt8[np.ndarray, "P P 3"]]  # side * side of them
    note: Mapping[str, Any]  # size_px, padding_cells: only where something was padded


def patches_of(item: Item, images: ImageFiles, geometry: Geometry) -> Patches:
    """Raises `UserError` that names an image which cannot be decoded, or is refused for its size."""
    if len(item.images) > 1:
        return _of_tiles(item, images, geometry)
    pixels = _decoded(images, item.images[0])
    height, width = pixels.shape[:2]
    square = _fitted(pixels, geometry.region_size, geometry.other_sizes, images, item.images[0])
    patches = list(cut(square, geometry.patch_size))
    if square is pixels:
        return Patches(patches, {})
    rows, columns = -(-height // geometry.patch_size), -(-width // geometry.patch_size)
    side = geometry.side
    beyond = [cell for cell in range(side * side) if cell // side >= rows or cell % side >= columns]
    return Patches(patches, {"size_px": [height, width], "padding_cells": beyond})


def cut(square: UInt8[np.ndarray, "S S 3"], patch_size: int) -> Iterator[UInt8[np.ndarray, "P P 3"]]:
    """The patches of a picture, row by row, as views."""
    for top in range(0, square.shape[0], patch_size):
        for left in range(0, square.shape[1], patch_size):
            yield square[top : top + patch_size, left : left + patch_size]


def wrong_size(item: Item, images: ImageFiles, geometry: Geometry) -> str:
    """`name (width x height px)` of an image that will be refused, as far as its header tells; '' for one that fits."""
    found = images.size_px(item.images[0])
    if found is None or not _is_refused(*found, geometry.region_size, geometry.other_sizes):
        return ""
    return _shown(images, item.images[0], *found)


def size_error(wrong: Sequence[str], size: int, other_sizes: OtherSizes, source: str) -> UserError:
    """For one or for many images, in one line."""
    advice = "give their size by --region-size or --patch-size, or leave them out"
    if other_sizes == "refuse":
        advice += "; --other-sizes pad lays smaller ones on white"
    what = f"not {size} x {size}" if other_sizes == "refuse" else f"larger than {size} x {size}"
    return UserError(f"{source}: {len(wrong):,} images are {what} px: {listed(wrong)}; {advice}")


def _of_tiles(item: Item, images: ImageFiles, geometry: Geometry) -> Patches:
    size = geometry.patch_size
    white = np.full((size, size, 3), _WHITE, np.uint8)
    patches = [
        white if number == NO_IMAGE else _fitted(_decoded(images, number), size, geometry.other_sizes, images, number)
        for number in item.images
    ]
    empty = [cell for cell, number in enumerate(item.images) if number == NO_IMAGE]
    return Patches(patches, {"padding_cells": empty} if empty else {})


def _decoded(images: ImageFiles, number: int) -> UInt8[np.ndarray, "H W 3"]:
    try:
        return decode(images.read_bytes(number))
    except DecodeError as error:
        raise UserError(
            f"{images.name_for_people(number)} cannot be decoded: {error}; mend it or leave it out"
        ) from error


def _fitted(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, other_sizes: OtherSizes, images: ImageFiles, number: int
) -> UInt8[np.ndarray, "S S 3"]:
    """The picture itself where it has the right size; smaller ones in the upper left corner of a white square."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    if _is_refused(height, width, size, other_sizes):
        raise size_error([_shown(images, number, height, width)], size, other_sizes, images.source)
    square = np.full((size, size, 3), _WHITE, np.uint8)
    square[:height, :width] = pixels
    return square


def _is_refused(height: int, width: int, size: int, other_sizes: OtherSizes) -> bool:
    return max(height, width) > size or ((height, width) != (size, size) and other_sizes == "refuse")


def _shown(images: ImageFiles, number: int, height: int, width: int) -> str:
    return f"{printable(images.paths[number])} ({width} x {height} px)"
