"""Settings of the backbone (recipe group `student`; the teacher is the same network without drop path)."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pathfm.config import Section

Architecture = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2", "vit4k_xs"]
FeedForward = Literal["mlp", "swiglu", "swiglufused"]
AttentionChoice = Literal["auto", "sdpa", "sdpa_fp32", "xformers", "varlen"]


class StudentConfig(Section):
    """Size and shape of the vision transformer, and whether it reads images or grids of patch features."""

    arch: Architecture = "vit_large"  # DINOv2's default recipe
    # Width of the patch features that the network reads in place of images, as `pathfm extract --regions` makes them.
    # Crops are then windows of their grid, crop sizes are counted in patches, and patch_size is 1.
    feature_width: Annotated[int, Field(gt=0)] | None = None
    patch_size: Annotated[int, Field(gt=0)] = 16  # DINOv2's default recipe; its published models use 14
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.3  # DINOv2's default recipe; 0.4 for ViT-L and ViT-g
    drop_path_uniform: bool = True  # DINOv2's default recipe; false lets the rate grow linearly with depth
    layerscale: Annotated[float, Field(ge=0)] = 1e-5  # DINOv2 table 16; 0 leaves LayerScale out
    ffn_layer: FeedForward = "mlp"  # DINOv2 uses SwiGLU for ViT-g; both SwiGLU names mean the same layer there and here
    qkv_bias: bool = True  # DINOv2's default recipe
    proj_bias: bool = True  # DINOv2's default recipe
    ffn_bias: bool = True  # DINOv2's default recipe
    num_register_tokens: Annotated[int, Field(ge=0)] = 0  # 4 in "Vision Transformers Need Registers", arXiv 2309.16588
    interpolate_antialias: bool = False  # DINOv2; true in its weights with registers
    interpolate_offset: Annotated[float, Field(ge=0)] = 0.1  # DINOv2; 0.0 in its weights with registers
    # A warm start: a file of pathfm, DINOv2, DINO, HIPT, timm or Hugging Face, or a run; read at the first start alone.
    pretrained_weights: str | None = None
    pretrained_allow: tuple[str, ...] = ()  # patterns of tensors that may be missing, unexpected or of another shape
    freeze_blocks: Annotated[int, Field(ge=0)] = 0  # the first n stay as they are, and with them what embeds patches
    # below: speed only
    attention: AttentionChoice = "auto"  # a run takes the fastest that works on its device, measured at its first start
    block_chunks: Annotated[int, Field(ge=0)] = 0  # accepted from old recipes: models here are never chunked

    def tokens_of(self, side: int) -> int:
        """Of a crop so many px, or patch features, wide and high: class token, registers, patches."""
        return 1 + self.num_register_tokens + (side // self.patch_size) ** 2

    @field_validator("pretrained_weights")
    @classmethod
    def _none_is_empty(cls, path: str | None) -> str | None:
        return path or None

    @model_validator(mode="after")
    def _features_are_patches(self) -> "StudentConfig":
        if self.feature_width is not None and self.patch_size != 1:
            raise ValueError(f"patch_size is 1 where patch features are read (feature_width), not {self.patch_size}")
        return self
