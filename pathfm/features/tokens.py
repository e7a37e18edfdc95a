"""What the tokens of a few tiles have to say: where [CLS] looks, and the patches in the colours of their main axes.

n tiles   S side in px   h, w rows and columns of a tile's patches   D width
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pathfm.batch import normalise_crops
from pathfm.features.attention import class_token_attention, coloured
from pathfm.models.vit import ViT
from pathfm.sheets import captioned, in_columns, stacked

_SIDE = 144  # px of a tile in the picture
_PERCENTILES = (1, 99)  # of a component's values: darkest and brightest


class TokenMaps(NamedTuple):
    attention: Float[Tensor, "n h w"]  # of [CLS] in the last block, mean of the heads
    components: Float[Tensor, "n h w 3"]  # of the patch tokens, 0..1, the same axes for all tiles


@torch.no_grad()
def token_maps(vit: ViT, images: UInt8[Tensor, "n 3 S S"]) -> TokenMaps:
    """Of a network that is in evaluation mode."""
    side = images.shape[-1] // vit.patch_size
    crops = normalise_crops(images)
    # In this order, and not by calling the network: a forward pass of a sharded block lets its weights go.
    attention = class_token_attention(vit, crops).mean(1).unflatten(1, (side, side))
    (tokens,) = vit.intermediate_layers(crops)
    return TokenMaps(attention, main_components(tokens.patches.float().cpu()).unflatten(1, (side, side)))


def main_components(patches: Float[Tensor, "n L D"]) -> Float[Tensor, "n L 3"]:
    """The first three principal components over all tiles together, each stretched to 0..1; the first says most."""
    centred = patches.flatten(0, 1).double()
    centred = centred - centred.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes[:, -3:].flip(1)
    # An axis has no direction of its own: its largest weight is made positive, so that pictures can be compared.
    largest = axes.abs().argmax(0, keepdim=True)
    projected = centred @ (axes * axes.gather(0, largest).sign())
    low, high = torch.tensor(np.percentile(projected.numpy(), _PERCENTILES, axis=0))
    stretched = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return stretched.float().unflatten(0, patches.shape[:2])


def tokens_picture(images: UInt8[Tensor, "n 3 S S"], maps: TokenMaps) -> Image.Image:
    """Tiles, attention and components, a column each of as many rows as there are tiles."""
    size = (_SIDE, _SIDE)
    tiles = [Image.fromarray(tile.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BOX) for tile in images.cpu()]
    attention = [coloured(tile, size) for tile in maps.attention]
    components = [
        Image.fromarray((255 * tile.numpy()).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        for tile in maps.components
    ]
    columns = {"tile": tiles, "[CLS] attention": attention, "patch tokens, PCA": components}
    return stacked([captioned([(caption, in_columns(pictures, 2)) for caption, pictures in columns.items()])])
