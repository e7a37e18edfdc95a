"""Features that are extracted but not yet put together: a few items a file, each file whole or not there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pathfm.errors import UserError
from pathfm.files import written_aside


@dataclass(frozen=True)
class Blocks:
    """Items `block_items * n` and on are block n. Which block holds what depends on nothing but the items' order."""

    folder: Path
    num_items: int
    block_items: int

    def __len__(self) -> int:
        return -(-self.num_items // self.block_items)

    def items_of(self, block: int) -> range:
        """Numbers of its items."""
        return range(block * self.block_items, min((block + 1) * self.block_items, self.num_items))

    def is_there(self, block: int) -> bool:
        return self._path(block).is_file()

    def missing(self) -> list[int]:
        """Blocks that are still to be extracted."""
        return [block for block in range(len(self)) if not self.is_there(block)]

    def write(self, block: int, features: Float[Tensor, "items ..."], notes: Sequence[Mapping[str, Any]]) -> None:
        """Publish a block by a rename. Raises `OSError` when the disk does not take it."""
        assert not self.is_there(block), f"block {block} was extracted already"
        assert len(features) == len(notes) == len(self.items_of(block)), (features.shape, len(notes), block)
        try:
            with written_aside(self._path(block)) as aside:
                torch.save({"features": features, "notes": [dict(note) for note in notes]}, aside)
        except RuntimeError as error:  # torch wraps the operating system's error
            raise OSError(" ".join(str(error).split())) from error

    def features(self) -> Iterator[Float[Tensor, "..."]]:
        """Of every item, in order."""
        for block in range(len(self)):
            yield from self._content(block)["features"]

    def feature(self, item: int) -> Float[Tensor, "..."]:
        """Of one item. Quick when the next is of the same block."""
        block, place = divmod(item, self.block_items)
        return _kept(self, block)["features"][place]

    def block(self, block: int) -> tuple[Float[Tensor, "items ..."], Sequence[Mapping[str, Any]]]:
        """Features and notes of its items; features come from the disk when they are looked at."""
        content = self._content(block)
        return content["features"], content["notes"]

    def notes(self) -> Iterator[Mapping[str, Any]]:
        """Of every item, in order."""
        for block in range(len(self)):
            yield from self._content(block)["notes"]

    def _content(self, block: int) -> dict[str, Any]:
        path = self._path(block)
        try:
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # it was whole when it was published, so the disk has damaged it
            raise UserError(f"{path} cannot be read ({error}); delete it and start again") from error
        return content

    def _path(self, block: int) -> Path:
        return self.folder / f"block_{block:08d}.pt"


@lru_cache(maxsize=8)
def _kept(blocks: Blocks, block: int) -> dict[str, Any]:
    return blocks._content(block)
