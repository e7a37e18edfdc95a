"""Labelled tiles in the order of their rows, at one size, each at most once: what features are compared on.

n tiles of a batch   S side in px
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from pathfm.data.config import MAX_PIXELS
from pathfm.data.decode import DecodeError, decode
from pathfm.data.loader import ImageDataset, load_items
from pathfm.errors import UserError


@dataclass(frozen=True)
class Tiles:
    """Some rows of a data set. A row that cannot be decoded has no neighbour to stand in for it: it is left out."""

    images: UInt8[Tensor, "n 3 S S"]
    rows: Int[Tensor, " n"]
    unreadable: tuple[str, ...] = ()  # file names with the reason


def load_tiles(
    dataset: ImageDataset,
    batches: Sequence[Sequence[int]],
    side: int,
    *,
    num_workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Tiles]:
    """The rows of each batch, which may be empty, in order; decoded by workers where there are any."""
    return load_items(_TileBatches(dataset, side, max_pixels), batches, num_workers, 2, False)


def share_of(num_rows: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's rows, batch by batch; every row belongs to one rank, and every rank has as many batches.

    The rows of a round lie together and are dealt out evenly, so only the last round can leave a rank without any.
    """
    share = []
    for first in range(0, num_rows, batch_size * world_size):
        of_round = range(first, min(first + batch_size * world_size, num_rows))
        start, stop = (len(of_round) * place // world_size for place in (rank, rank + 1))
        share.append(list(of_round[start:stop]))
    return share


def at_side(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "S S 3"]:
    """The shorter side scaled to `side` px, then the middle square: as ImageNet evaluations of DINOv2 see pictures."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(image, size, interpolation=how)
    top, left = (scaled.shape[0] - side) // 2, (scaled.shape[1] - side) // 2
    return scaled[top : top + side, left : left + side]


@dataclass(frozen=True)
class _TileBatches(Dataset[Tiles | UserError]):
    """It travels to the workers by pickle. A user's mistake is handed over as a value, as `load_items` wants it."""

    dataset: ImageDataset
    side: int
    max_pixels: int

    def __getitem__(self, rows: Sequence[int]) -> Tiles | UserError:
        try:
            return self._tiles(rows)
        except UserError as error:
            return error

    def _tiles(self, rows: Sequence[int]) -> Tiles:
        self.dataset.will_need(list(rows))
        images, readable, unreadable = [], [], []
        for row in rows:
            try:
                images.append(at_side(decode(self.dataset.read_bytes(row), self.max_pixels), self.side))
                readable.append(row)
            except DecodeError as error:
                unreadable.append(f"{self.dataset.name_of(row)}: {error}")
        pixels = np.stack(images) if images else np.empty((0, self.side, self.side, 3), np.uint8)
        as_tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        return Tiles(as_tensor, torch.tensor(readable, dtype=torch.int64), tuple(unreadable))
