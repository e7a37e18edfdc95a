"""Tiny random backbones of every kind that other libraries know."""

from pathlib import Path

import torch

from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import Pretrained
from pathfm.models.vit import ViT


def tiny(**settings: object) -> Pretrained:
    """36 wide, 2 blocks, positions for 4 x 4 patches. All parameters are drawn, so that none can be lost unseen."""
    torch.manual_seed(0)
    patch_size = settings.get("patch_size", 14)
    shape = {"image_size": 4 * patch_size, "patch_size": patch_size, "width": 36, "num_heads": 3}
    vit = ViT(**{**shape, "drop_path_rates": [0.0] * 2, "layerscale": 0.1, **settings})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return Pretrained(vit.eval().requires_grad_(False), StudentConfig(), Path("tiny.pth"), "", {})
