"""What every library takes of a backbone: its shape, weights without gaps, positions for one image size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from pathfm.errors import UserError
from pathfm.models.layers import Block, Mlp, SwiGLU
from pathfm.models.position import resized_positions
from pathfm.models.pretrained import Pretrained
from pathfm.models.vit import ViT


class Resampling(NamedTuple):
    """How positions are brought to another grid: always bicubic."""

    antialias: bool
    offset: float


@dataclass(frozen=True)
class Written:
    """An export: for which image size, whether other sizes give our features too, and what its reader must know."""

    image_size: int
    any_size: bool
    loading: str  # Python that loads it from its folder and gives `cls` and `patches` of `images`
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """Of a backbone that reads images."""

    width: int
    depth: int
    num_heads: int
    patch_size: int
    num_registers: int
    learned_size: int  # px, for which positions were learned
    hidden: int  # of the feed-forward; of SwiGLU either half
    is_swiglu: bool
    has_layerscale: bool
    resampling: Resampling


def shape_of(vit: ViT) -> Shape:
    first = vit.blocks[0]
    assert isinstance(first, Block)
    assert isinstance(first.mlp, Mlp | SwiGLU)
    is_swiglu = isinstance(first.mlp, SwiGLU)
    return Shape(
        width=vit.width,
        depth=len(vit.blocks),
        num_heads=first.attn.num_heads,
        patch_size=vit.patch_size,
        num_registers=vit.num_register_tokens,
        learned_size=vit.patch_size * vit.learned_grid,
        hidden=first.mlp.w3.in_features if isinstance(first.mlp, SwiGLU) else first.mlp.fc1.out_features,
        is_swiglu=is_swiglu,
        has_layerscale="blocks.0.ls1.gamma" in vit.state_dict(),
        resampling=Resampling(vit.interpolate_antialias, vit.interpolate_offset),
    )


def demand_images(model: Pretrained, target: str) -> None:
    if model.reads_features:
        raise UserError(
            f"{model.path} reads patch features, which {target} does not; take --to safetensors or ancestor"
        )


def whole_patches(shape: Shape, image_size: int | None) -> int:
    """The size that is asked for, or that of the learned positions."""
    size = image_size or shape.learned_size
    if size % shape.patch_size:
        below = size // shape.patch_size * shape.patch_size
        raise UserError(
            f"--image-size {size} is not a whole number of {shape.patch_size} px patches; "
            f"take {max(below, shape.patch_size)} or {below + shape.patch_size}"
        )
    return size


def with_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers that were trained without a bias get one of zeros."""
    return {name: value for pair in _with_biases(weights) for name, value in pair}


def _with_biases(weights: Mapping[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    for name, value in weights.items():
        bias = name.removesuffix(".weight") + ".bias"
        if name.endswith(".weight") and bias not in weights:
            yield [(name, value), (bias, value.new_zeros(len(value)))]
        else:
            yield [(name, value)]


def with_layerscale(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Blocks that were trained without LayerScale get factors of one, which change nothing."""
    one = weights["cls_token"].new_ones(weights["cls_token"].shape[-1])
    ones = {f"blocks.{number}.{part}.gamma": one for number in range(depth) for part in ("ls1", "ls2")}
    return {**ones, **weights}


def positions_at(vit: ViT, image_size: int) -> Tensor:
    """[1, 1 + L, D]: as the backbone itself resamples them for images of this size."""
    side = image_size // vit.patch_size
    with torch.no_grad():
        patches = resized_positions(
            vit.pos_embed[0, 1:], (side, side), antialias=vit.interpolate_antialias, offset=vit.interpolate_offset
        )
        return torch.cat([vit.pos_embed[:, :1], patches[None]], dim=1)


def save_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that whoever may read its folder can read: `save_file` keeps it from all others."""
    path.write_bytes(save(saved(weights), metadata={"format": "pt"}))


def saved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As files take them: on the CPU, no two sharing memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
