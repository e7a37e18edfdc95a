"""Heads on frozen patch tokens, and what they are asked for: a class for every pixel, or a number.

n windows   D channels: the width of all blocks that are read   y, x rows and columns of patches
h, w window size in px   C classes   O outputs of the linear layer   K bins
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from pathfm.evaluate.dense.losses import IGNORED, pixel_cross_entropy, scale_invariant_log_loss
from pathfm.models.vit import ViT, as_grid
from pathfm.random_streams import derived_seed

_FINER = 4  # the grid on which bins are weighed, for each patch and direction; DINOv2's depth heads
_LEAST_WEIGHT = 0.1  # of a bin, before they are made to sum to 1; AdaBins' and DINOv2's


class Tokens(NamedTuple):
    """What the last blocks say of windows: their patches as pictures, and their class tokens."""

    patches: Float[Tensor, "n D y x"]
    cls: Float[Tensor, "n D"]


class FrozenTokens:
    """Normed tokens of the last blocks of a backbone, one after the other as channels. Nothing learns in it."""

    def __init__(self, vit: ViT, blocks: int) -> None:
        self._vit, self._blocks = vit.eval(), min(blocks, len(vit.blocks))
        self.channels = self._blocks * vit.width
        self.patch_size = vit.patch_size

    @torch.no_grad()
    def __call__(self, windows: Float[Tensor, "n 3 h w"]) -> Tokens:
        """Of normalised windows of whole patches."""
        rows, columns = (side // self.patch_size for side in windows.shape[-2:])
        blocks = self._vit.intermediate_layers(windows, self._blocks)
        patches = torch.cat([as_grid(block.patches, rows, columns) for block in blocks], dim=1)
        return Tokens(patches.float(), torch.cat([block.cls for block in blocks], dim=1).float())


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution on patch tokens (DINOv2, arXiv 2304.07193, section 7.4).

    With `use_cls` every patch also reads its window's class tokens, as DINOv2's depth heads do. Its first weights
    depend on `seed` alone; torch's default generator is not touched.
    """

    def __init__(self, channels: int, outputs: int, *, use_cls: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.use_cls = use_cls
        channels *= 1 + use_cls
        # What is normed never changes, so the mean over all steps (momentum None) is its statistic, not a recent one.
        self.norm = nn.BatchNorm2d(channels, momentum=None)
        self.linear = skip_init(nn.Conv2d, channels, outputs, kernel_size=1)
        drawn = torch.Generator().manual_seed(derived_seed(seed, 0, "dense head"))
        nn.init.normal_(self.linear.weight, std=0.01, generator=drawn)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tokens) -> Float[Tensor, "n O y x"]:
        patches = tokens.patches
        if self.use_cls:
            patches = torch.cat(
                [patches, tokens.cls[:, :, None, None].expand(*tokens.cls.shape, *patches.shape[2:])], 1
            )
        scores: Tensor = self.linear(self.norm(patches))
        return scores


class Task(Protocol):
    """What a head's outputs mean."""

    @property
    def outputs(self) -> int: ...

    @property
    def unknown(self) -> float:
        """The target of a pixel that counts nowhere."""

    def maps(self, outputs: Float[Tensor, "n O y x"], size: tuple[int, int]) -> Float[Tensor, "n C h w"]:
        """At every pixel, what is averaged over windows."""

    def loss(self, maps: Float[Tensor, "n C h w"], target: Tensor) -> Float[Tensor, ""]: ...

    def certain(self, maps: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
        """What is averaged over scales."""

    def answer(self, maps: Float[Tensor, "C H W"]) -> Tensor:
        """[H, W]: the class, or the number, of every pixel."""


@dataclass(frozen=True)
class Segmentation:
    """A class for every pixel. Logits are averaged over windows, probabilities over scales."""

    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        return len(self.classes)

    @property
    def unknown(self) -> float:
        return IGNORED

    def maps(self, outputs: Float[Tensor, "n O y x"], size: tuple[int, int]) -> Float[Tensor, "n O h w"]:
        return functional.interpolate(outputs, size, mode="bilinear")

    def loss(self, maps: Float[Tensor, "n C h w"], target: Int[Tensor, "n h w"]) -> Float[Tensor, ""]:
        return pixel_cross_entropy(maps, target)

    def certain(self, maps: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
        return maps.softmax(0)

    def answer(self, maps: Float[Tensor, "C H W"]) -> Int[Tensor, "H W"]:
        return maps.argmax(0)


@dataclass(frozen=True)
class Regression:
    """A positive number for every pixel: the expectation over bins from `low` to `high` (DINOv2's linear depth heads).

    A bin weighs relu(output) + 0.1, made to sum to 1. Outputs are first brought to a grid four times finer than the
    patches, as DINOv2 does with tokens, which for a linear head is the same; then the numbers are to the pixels.
    """

    low: float
    high: float
    outputs: int = 256  # DINOv2

    @property
    def unknown(self) -> float:
        return 0.0

    def maps(self, outputs: Float[Tensor, "n K y x"], size: tuple[int, int]) -> Float[Tensor, "n 1 h w"]:
        finer = functional.interpolate(outputs, scale_factor=_FINER, mode="bilinear")
        weights = finer.relu() + _LEAST_WEIGHT
        weights = weights / weights.sum(1, keepdim=True)
        bins = torch.linspace(self.low, self.high, self.outputs, device=outputs.device)
        numbers = torch.einsum("nkyx,k->nyx", weights, bins)[:, None]
        return functional.interpolate(numbers, size, mode="bilinear")

    def loss(self, maps: Float[Tensor, "n 1 h w"], target: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
        return scale_invariant_log_loss(maps[:, 0], target)

    def certain(self, maps: Float[Tensor, "1 H W"]) -> Float[Tensor, "1 H W"]:
        return maps

    def answer(self, maps: Float[Tensor, "1 H W"]) -> Float[Tensor, "H W"]:
        return maps[0]
