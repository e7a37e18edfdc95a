"""Windows over a picture of any size: cut from it, mirrored beyond its edges, and laid back where they overlap.

H, W picture size in px   h, w window size in px   n windows of a picture, row by row   C channels
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathfm.errors import UserError

LARGEST_BY_ITSELF = 512  # px; DINOv2's windows for segmentation


@dataclass(frozen=True)
class Windows:
    """Size and stride, each (down, across) in px and a whole number of patches."""

    size: tuple[int, int]
    stride: tuple[int, int]

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of every window. The last of a row or column may reach beyond the picture."""
        tops, lefts = (_starts(*axis) for axis in zip((height, width), self.size, self.stride, strict=True))
        return [(top, left) for top in tops for left in lefts]

    def cut(self, picture: Float[Tensor, "C H W"]) -> Float[Tensor, "n C h w"]:
        """All windows. Beyond its lower and right edge the picture is mirrored, as often as it takes."""
        return self._cut(picture, mirrored)

    def cut_target(self, target: Tensor, fill: float) -> Tensor:
        """[H, W] -> [n, h, w]: what is wanted in every window; beyond the picture it is `fill`, which nobody scores."""
        return self._cut(target[None], partial(_filled, value=fill))[:, 0]

    def merge(self, maps: Float[Tensor, "n C h w"], height: int, width: int) -> Float[Tensor, "C H W"]:
        """The mean of all windows over a pixel; what lies beyond the picture is dropped."""
        corners = self.corners(height, width)
        bottom, right = (last + side for last, side in zip(corners[-1], self.size, strict=True))
        total = maps.new_zeros(maps.shape[1], bottom, right)
        times = maps.new_zeros(bottom, right)
        for (top, left), window in zip(corners, maps, strict=True):
            place = (slice(top, top + self.size[0]), slice(left, left + self.size[1]))
            total[(slice(None), *place)] += window
            times[place] += 1
        return (total / times)[:, :height, :width]

    def _cut(self, picture: Tensor, extend: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        corners = self.corners(*picture.shape[-2:])
        height, width = (last + side for last, side in zip(corners[-1], self.size, strict=True))
        whole = extend(picture, height, width)
        return torch.stack([whole[:, top : top + self.size[0], left : left + self.size[1]] for top, left in corners])


def windows_for(
    patch_size: int, largest: tuple[int, int], window: int | None = None, stride: int | None = None
) -> Windows:
    """Square windows of `window` px; without it, the size of the largest picture, up to 512 px, in whole patches.

    The stride is two thirds of the window unless it is said (DINOv2's 341 of 512). Raises `UserError` for sizes that
    are no whole patches, or a stride that leaves gaps.
    """
    for name, value in (("window", window), ("stride", stride)):
        if value is not None and (value < patch_size or value % patch_size):
            near = max(patch_size, round(value / patch_size) * patch_size)
            raise UserError(f"--{name} {value} is no whole number of {patch_size} px patches; take {near}")
    most = LARGEST_BY_ITSELF // patch_size
    height, width = (
        window or max(1, min(-(-side // patch_size), most)) * patch_size  # a picture is filled up to whole patches
        for side in largest
    )
    if stride is not None and stride > min(height, width):
        raise UserError(f"--stride {stride} leaves gaps between windows of {height} x {width} px; take less")
    down, across = (stride or max(1, side * 2 // (3 * patch_size)) * patch_size for side in (height, width))
    return Windows((height, width), (down, across))


def mirrored(picture: Tensor, height: int, width: int) -> Tensor:
    """[C, H, W] continued downwards and to the right to `height` x `width`, without repeating the edge itself."""
    rows = _mirrored_indices(picture.shape[-2], height).to(picture.device)
    columns = _mirrored_indices(picture.shape[-1], width).to(picture.device)
    return picture[:, rows][:, :, columns]


def _starts(length: int, size: int, stride: int) -> range:
    further = -(-max(length - size, 0) // stride)
    return range(0, further * stride + 1, stride)


def _mirrored_indices(length: int, wanted: int) -> Int[Tensor, " wanted"]:
    period = max(1, 2 * length - 2)
    places = torch.arange(wanted) % period
    return torch.minimum(places, period - places) if length > 1 else torch.zeros_like(places)


def _filled(picture: Tensor, height: int, width: int, value: float) -> Tensor:
    whole = picture.new_full((picture.shape[0], height, width), value)
    whole[:, : picture.shape[1], : picture.shape[2]] = picture
    return whole
