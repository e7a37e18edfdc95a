"""What the [CLS] token of the last block looks at: over a region's patches stitched together, and over their grid.

H heads   h, w rows and columns of a region's patches   t tokens along a side of a patch   C width of patch features
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pathfm.batch import normalise_crops
from pathfm.models.vit import ViT
from pathfm.sheets import captioned, stacked

_SIDE = 512  # px of the longer side of a panel
_COLUMNS = 4
_PERCENTILES = (1, 99)  # what is drawn as black and as the brightest colour
_TISSUE_SHARE = 0.6  # of the tissue in the panel that lays attention over it
_COLOURS = "inferno"


@torch.inference_mode()
def patch_attention(vit: ViT, patches: Iterable[Tensor], rows: int, columns: int) -> Float[Tensor, "H ht wt"]:
    """Of every patch over its own tokens, all stitched together.

    A patch's weights sum to 1 (less those on the class token and registers), whatever there is to see in it: seams
    between patches are no mistake, and an even patch is evenly coloured.
    `patches`: chunks of a region's patches [N, 3, P, P], row by row, uint8 or normalised.
    """
    device = vit.cls_token.device
    looks = [class_token_attention(vit, normalise_crops(chunk.to(device))) for chunk in patches]
    of_patches = torch.cat(looks)  # [h * w, H, t * t]
    side = round(of_patches.shape[-1] ** 0.5)
    cells = of_patches.unflatten(0, (rows, columns)).unflatten(3, (side, side))
    return cells.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


@torch.inference_mode()
def region_attention(vit: ViT, grid: Float[Tensor, "C h w"]) -> Float[Tensor, "H h w"]:
    """Of a region over its patches."""
    return class_token_attention(vit, grid[None])[0].unflatten(1, grid.shape[1:])


def attention_picture(tissue: UInt8[np.ndarray, "Y X 3"], attention: Float[Tensor, "H y x"], level: str) -> Image.Image:
    """The tissue, the heads' mean over it and alone, and each head; every panel in its own scale of brightness."""
    height, width = tissue.shape[:2]
    size = (max(1, _SIDE * width // max(height, width)), max(1, _SIDE * height // max(height, width)))
    shown = Image.fromarray(tissue).resize(size, Image.Resampling.BOX)
    mean = coloured(attention.mean(0), size)
    panels = {
        f"tissue, {width} x {height} px": shown,
        f"{level}: mean of the heads, on the tissue": Image.blend(mean, shown, _TISSUE_SHARE),
        f"{level}: mean of the {len(attention)} heads": mean,
        **{f"{level}: head {number}": coloured(head, size) for number, head in enumerate(attention, start=1)},
    }
    return _sheet(panels)


def class_token_attention(vit: ViT, images: Tensor) -> Float[Tensor, "N H L"]:
    """Weights over the patch tokens, without those on itself and on registers."""
    return vit.last_attention(images)[:, :, 0, 1 + vit.num_register_tokens :].float().cpu()


def coloured(attention: Float[Tensor, "y x"], size: tuple[int, int]) -> Image.Image:
    """Weights as a picture of `size` px, from black to the brightest colour."""
    import matplotlib

    low, high = np.percentile(attention.numpy(), _PERCENTILES)
    scaled = np.clip((attention.numpy() - low) / max(high - low, 1e-12), 0, 1)
    colours = matplotlib.colormaps[_COLOURS](scaled)[..., :3]
    return Image.fromarray((255 * colours).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def _sheet(panels: Mapping[str, Image.Image]) -> Image.Image:
    pairs = list(panels.items())
    rows = [pairs[first : first + _COLUMNS] for first in range(0, len(pairs), _COLUMNS)]
    return stacked([captioned(row) for row in rows])
