"""What hubconf.py hands out: a backbone with the methods of DINOv2's hub models, for code that was written for those.

B images  L patches  R registers  N = 1 + R + L tokens  D width  h, w image size in px
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from pathfm.errors import UserError
from pathfm.models.build import SIZES, build_backbone
from pathfm.models.config import Architecture, StudentConfig
from pathfm.models.pretrained import load_backbone
from pathfm.models.vit import ViT, as_grid

_OFFICIAL_SIZE = 518  # px, for which the published models learned positions


class HubModel(nn.Module):
    """`vit` is the backbone itself."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit
        self.embed_dim = self.num_features = vit.width
        self.patch_size = vit.patch_size
        self.num_register_tokens = vit.num_register_tokens
        self.n_blocks = len(vit.blocks)

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
        return self.vit([images])[0].cls

    def forward_features(
        self, images: Float[Tensor, "B 3 h w"], masks: Bool[Tensor, "B L"] | None = None
    ) -> dict[str, Any]:
        features = self.vit([images], [masks])[0]
        return {
            "x_norm_clstoken": features.cls,
            "x_norm_regtokens": features.registers,
            "x_norm_patchtokens": features.patches,
            "x_prenorm": features.prenorm,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Float[Tensor, "B 3 h w"],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Patch tokens [B, L, D], or [B, D, rows, columns], of the last n blocks or of these; with [CLS] if wanted."""
        layers = self.vit.intermediate_layers(x, n, norm=norm)
        rows, columns = self.vit.embed.grid_of(x)
        patches = [as_grid(layer.patches, rows, columns) if reshape else layer.patches for layer in layers]
        if return_class_token:
            return tuple((tokens, layer.cls) for tokens, layer in zip(patches, layers, strict=True))
        return tuple(patches)


def hub_model(weights: str) -> HubModel:
    """Frozen, in evaluation mode. Raises `UserError` where there is no backbone that reads images."""
    model = load_backbone(Path(weights).expanduser())
    if model.reads_features:
        raise UserError(
            f"{weights} reads patch features, not images; load it by pathfm.models.pretrained.load_backbone"
        )
    return HubModel(model.vit).eval()


def official_model(arch: Architecture, num_registers: int, weights: str | None, *, pretrained: bool) -> HubModel:
    """One of DINOv2's architectures with weights of a file, or without `pretrained` with random ones to be trained.

    Raises `UserError` when the file is of another architecture, or none is named: nothing is downloaded.
    """
    if weights is not None:
        model = hub_model(weights)
        _demand_official(model, arch, num_registers, weights)
        return model
    if pretrained:
        raise UserError("nothing is downloaded here; give weights=FILE, or pretrained=False for random weights")
    student = StudentConfig(
        arch=arch,
        patch_size=14,
        ffn_layer="swiglu" if arch == "vit_giant2" else "mlp",
        num_register_tokens=num_registers,
        interpolate_antialias=num_registers > 0,
        interpolate_offset=0.0 if num_registers else 0.1,
    )
    return HubModel(build_backbone(student, _OFFICIAL_SIZE, drop_path=False))


def _demand_official(model: HubModel, arch: Architecture, num_registers: int, weights: str) -> None:
    found = (model.embed_dim, model.n_blocks, model.patch_size, model.num_register_tokens)
    wanted = (SIZES[arch].width, SIZES[arch].depth, 14, num_registers)
    if found != wanted:
        words = "width {}, {} blocks, {} px patches, {} registers"
        raise UserError(
            f"{weights} is another model: {words.format(*found)}, not {words.format(*wanted)}; take 'pathfm'"
        )
