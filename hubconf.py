"""Entry points of `torch.hub.load(REPO, NAME, source="local", weights=FILE)`. Nothing is downloaded."""

from collections.abc import Callable as _Callable
from typing import TYPE_CHECKING as _TYPE_CHECKING

dependencies = ["torch", "numpy", "jaxtyping", "omegaconf", "pydantic", "safetensors", "yaml"]

if _TYPE_CHECKING:
    from pathfm.export.hub import HubModel as _HubModel
    from pathfm.models.config import Architecture as _Architecture


def pathfm(weights: str) -> "_HubModel":
    """A backbone from a file of pathfm, DINOv2, DINO, timm or Hugging Face, with the methods of DINOv2's models."""
    from pathfm.export.hub import hub_model

    return hub_model(weights)


def _official(arch: "_Architecture", num_registers: int = 0) -> "_Callable[..., _HubModel]":
    def entry_point(*, weights: str | None = None, pretrained: bool = True) -> "_HubModel":
        """This architecture of DINOv2: `weights=FILE`, or `pretrained=False` for random ones."""
        from pathfm.export.hub import official_model

        return official_model(arch, num_registers, weights, pretrained=pretrained)

    return entry_point


dinov2_vits14 = _official("vit_small")
dinov2_vitb14 = _official("vit_base")
dinov2_vitl14 = _official("vit_large")
dinov2_vitg14 = _official("vit_giant2")
dinov2_vits14_reg = _official("vit_small", 4)
dinov2_vitb14_reg = _official("vit_base", 4)
dinov2_vitl14_reg = _official("vit_large", 4)
dinov2_vitg14_reg = _official("vit_giant2", 4)
