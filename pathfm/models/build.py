"""A backbone from its settings."""

from typing import NamedTuple

from pathfm.models.config import Architecture, StudentConfig
from pathfm.models.vit import ViT


class Size(NamedTuple):
    """Width, depth and number of heads of an architecture."""

    width: int
    depth: int
    num_heads: int


SIZES: dict[Architecture, Size] = {
    "vit_tiny": Size(192, 12, 3),  # DeiT, arXiv 2012.12877
    "vit_small": Size(384, 12, 6),  # DeiT
    "vit_base": Size(768, 12, 12),  # ViT, arXiv 2010.11929
    "vit_large": Size(1024, 24, 16),  # ViT
    "vit_giant2": Size(1536, 40, 24),  # DINOv2 table 17
    "vit4k_xs": Size(192, 6, 6),  # HIPT, arXiv 2206.02647: the transformer over a region's patch features
}


def build_backbone(config: StudentConfig, image_size: int, *, drop_path: bool, has_mask_token: bool = True) -> ViT:
    """The student's backbone, or with `drop_path=False` the teacher's and anyone's who only reads features.

    `image_size` is the size of the crops for which positions are learned, the global crops: in px, or in patches where
    patch features are read. `has_mask_token`: whether the method masks patches.
    """
    size = SIZES[config.arch]
    return ViT(
        image_size=image_size,
        patch_size=config.patch_size,
        width=size.width,
        num_heads=size.num_heads,
        drop_path_rates=drop_path_rates(config, size.depth) if drop_path else [0.0] * size.depth,
        ffn_layer=config.ffn_layer,
        layerscale=config.layerscale,
        qkv_bias=config.qkv_bias,
        proj_bias=config.proj_bias,
        ffn_bias=config.ffn_bias,
        num_register_tokens=config.num_register_tokens,
        interpolate_antialias=config.interpolate_antialias,
        interpolate_offset=config.interpolate_offset,
        attention=config.attention,
        feature_width=config.feature_width,
        has_mask_token=has_mask_token,
    )


def drop_path_rates(config: StudentConfig, depth: int) -> list[float]:
    """One rate per block: the same everywhere, or growing linearly from 0."""
    if config.drop_path_uniform:
        return [config.drop_path_rate] * depth
    return [config.drop_path_rate * number / max(depth - 1, 1) for number in range(depth)]
