"""This rank's blocks, one after the other: images are read and decoded by threads while the backbone computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from pathfm.data.image_files import ImageFiles
from pathfm.features.blocks import Blocks
from pathfm.features.frozen import Backbone, class_token_features
from pathfm.features.items import Item
from pathfm.features.patches import Geometry, Patches, patches_of

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Extractor:
    """How items become blocks of features; the same for every rank."""

    items: Sequence[Item]
    images: ImageFiles
    geometry: Geometry
    backbone: Backbone
    blocks: Blocks
    device: torch.device
    batch_size: int  # patches of a forward pass
    readers: int  # threads, each with one item decoded ahead
    of_tiles: bool = False  # an item's features are [width], not [npatch, width]

    def run(self, blocks: Iterable[int]) -> Iterator[int]:
        """Write these blocks; yields each once it is published. May be left at any of them."""
        blocks = list(blocks)
        numbers = (number for block in blocks for number in self.blocks.items_of(block))
        decoded = ahead(self._patches, numbers, self.readers)
        for block in blocks:
            self._write(block, islice(decoded, len(self.blocks.items_of(block))))
            yield block

    def _patches(self, number: int) -> Patches:
        return patches_of(self.items[number], self.images, self.geometry)

    def _write(self, block: int, items: Iterable[Patches]) -> None:
        """Items arrive one by one, so that no more than a few are in memory."""
        notes = []

        def patches() -> Iterator[np.ndarray]:
            for item in items:
                notes.append(item.note)
                yield from item.pixels

        rows = class_token_features(self.backbone, patches(), self.device, self.batch_size)
        self.blocks.write(block, rows if self.of_tiles else rows.unflatten(0, (len(notes), -1)), notes)


def ahead(function: Callable[[Given], Made], items: Iterable[Given], threads: int) -> Iterator[Made]:
    """`function` of every item, in order, computed by threads up to that many items ahead."""
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
