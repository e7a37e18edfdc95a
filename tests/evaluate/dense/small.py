"""A tiny backbone, and pictures on which it can learn something in seconds."""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from pathfm.evaluate.dense.fit import Sight, Truth
from pathfm.evaluate.dense.heads import FrozenTokens
from pathfm.evaluate.dense.windows import Windows
from pathfm.models.vit import ViT

PATCH = 8
CPU = torch.device("cpu")


def tiny_vit(seed: int = 0) -> ViT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = ViT(image_size=48, patch_size=PATCH, width=48, num_heads=2, drop_path_rates=[0.0, 0.0], layerscale=0.0)
    return vit.eval().requires_grad_(False)


def sight(size: int = 48, stride: int = 32, *, blocks: int = 1, scales: Sequence[float] = (1.0,)) -> Sight:
    return Sight(FrozenTokens(tiny_vit(), blocks), Windows((size, size), (stride, stride)), tuple(scales), CPU)


def squares(seed: int, height: int = 48, width: int = 48) -> Truth:
    """Noise, and on it bright (1) and dark (2) squares that are no whole patches."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 166, (height, width, 3)).astype(np.uint8)
    target = np.zeros((height, width), np.uint8)
    for number in range(4):
        top, left, side = rng.integers(0, height - 12), rng.integers(0, width - 12), rng.integers(10, 20)
        place = (slice(top, top + side), slice(left, left + side))
        image[place] = image[place] // 2 + (128 if number % 2 else 0)
        target[place] = 1 if number % 2 else 2
    return Truth(image, torch.from_numpy(target))


def hills(seed: int, height: int = 48, width: int = 48) -> Truth:
    """A smooth landscape from 1 to 5, as bright as it is high."""
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(height, width)), (0, 0), 8)
    level = (noise - noise.min()) / (noise.max() - noise.min())
    image = np.repeat((255 * level).astype(np.uint8)[..., None], 3, axis=2)
    return Truth(image, torch.from_numpy(1 + 4 * level).float())


def made(picture: Callable[[int], Truth], number: int) -> list[Truth]:
    return [picture(seed) for seed in range(number)]
