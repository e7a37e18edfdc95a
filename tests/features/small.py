"""Small regions and a small backbone that reads them in no time."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.vit import ViT

REGION, PATCH, SIDE = 128, 32, 4  # px, px, patches beside each other
CELLS = SIDE * SIDE
WIDTH = 192
STUDENT = StudentConfig(arch="vit_tiny", patch_size=16, layerscale=0.0, interpolate_offset=0.0)
SIZES = ("--region-size", str(REGION), "--patch-size", str(PATCH))


def patch_backbone(seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return build_backbone(STUDENT, 48, drop_path=False, has_mask_token=False).eval().requires_grad_(False)


def region_backbone(seed: int = 1) -> ViT:
    torch.manual_seed(seed)
    student = StudentConfig(arch="vit4k_xs", feature_width=WIDTH, patch_size=1, layerscale=0.0)
    return build_backbone(student, 3, drop_path=False, has_mask_token=False).eval().requires_grad_(False)


def saved_teacher(path: Path, vit: ViT, prefix: str = "backbone.") -> Path:
    """As a run exports it: with a head beside the backbone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {f"{prefix}{name}": value for name, value in vit.state_dict().items()}
    torch.save({"teacher": {**weights, f"{prefix.removesuffix('backbone.')}head.mlp.0.weight": torch.zeros(2)}}, path)
    return path


def picture(seed: int, height: int = REGION, width: int = REGION) -> np.ndarray:
    """Coarse spots, so that every patch differs from every other."""
    spots = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.array(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))


def save_picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make_regions(folder: Path, number: int = 6) -> Path:
    """Two slides, whose regions are called by their place."""
    for index in range(number):
        save_picture(folder / f"slide_{'ab'[index % 2]}_x{128 * index}_y0.png", picture(index))
    return folder
