"""The vision transformer of DINOv2 (arXiv 2304.07193): registers, LayerScale, drop path, masked patches, packed crops.

B crops of a group   L patches of a crop   R registers   N = 1 + R + L tokens of a crop   T tokens of all crops together
D width   h, w crop size in px   C 3, or the width of patch features   H heads
A crop's tokens are in the order class token, registers, patches (row-major over the grid).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pathfm.models.attention import Backend, Layout, choose_backend, token_slices
from pathfm.models.config import AttentionChoice, FeedForward
from pathfm.models.layers import Block, FeatureEmbed, LayerScale, Norm, PatchEmbed
from pathfm.models.position import resized_positions


class Features(NamedTuple):
    """What the backbone says about the crops of one group."""

    cls: Float[Tensor, "B D"]
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B L D"]
    prenorm: Float[Tensor, "B N D"]  # all tokens before the last norm


class ViT(nn.Module):
    """A vision transformer whose parameters carry the official DINOv2 checkpoints' names.

    `drop_path_rates` has one rate per block and so sets the depth. `image_size` (px) sets the learned position grid;
    crops of any whole number of patches are accepted, and their positions are resampled from it.
    With `feature_width` it reads grids of patch features [B, C, h, w] in place of images (HIPT, arXiv 2206.02647); a
    crop's size is then a side of its grid, `patch_size` 1. Without `has_mask_token` nothing can be masked, as in DINO.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        num_heads: int,
        drop_path_rates: Sequence[float],
        ffn_layer: FeedForward = "mlp",
        mlp_ratio: float = 4.0,
        layerscale: float = 1e-5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention: AttentionChoice = "auto",
        feature_width: int | None = None,
        has_mask_token: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.attention: AttentionChoice = attention
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, width))
        self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, width)) if num_register_tokens else None
        self.mask_token = nn.Parameter(torch.empty(1, width)) if has_mask_token else None
        if feature_width is None:
            self.patch_embed = PatchEmbed(patch_size, width)
        else:
            assert patch_size == 1, patch_size
            self.phi = FeatureEmbed(feature_width, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                ffn_layer=ffn_layer,
                mlp_ratio=mlp_ratio,
                layerscale=layerscale,
                drop_path_rate=rate,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
            )
            for rate in drop_path_rates
        )
        self.norm = Norm(width)
        self.initialise()

    @property
    def learned_grid(self) -> int:
        """Rows, and columns, of patches for which positions were learned."""
        return round((self.pos_embed.shape[1] - 1) ** 0.5)

    @property
    def embed(self) -> PatchEmbed | FeatureEmbed:
        """What makes tokens of the input. Checkpoints call it `patch_embed`, or `phi` where features are read."""
        return self.phi if hasattr(self, "phi") else self.patch_embed

    @torch.no_grad()
    def initialise(self) -> None:
        """DINOv2's initial weights, drawn from torch's default generator; the patch projection keeps torch's own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.initial)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]:
        """Features of several groups of crops in one pass over all their tokens.

        `crops`: one float tensor [B, 3, h, w] per group; sizes may differ between groups, B and h, w too.
        `masks`: per group None or bool [B, L]; a masked patch's embedding is replaced by the mask token.
        The numbers are those of every group, and every crop, passed alone. Raises `UserError` for a crop that is
        not a whole number of patches.
        """
        groups = [self._tokens_of(*group) for group in zip(crops, masks or [None] * len(crops), strict=True)]
        layout = tuple((len(group), group.shape[1]) for group in groups)
        tokens = torch.cat([group.flatten(0, 1) for group in groups])
        backend = self._backend_for(tokens)
        for block in self.blocks:
            tokens = block(tokens, layout, backend)
        return self._features_of(tokens, self.norm(tokens), layout)

    def intermediate_layers(
        self, images: Float[Tensor, "B C h w"], blocks: int | Sequence[int] = 1, *, norm: bool = True
    ) -> list[Features]:
        """Features after the last `blocks` blocks (or after the blocks of these numbers), in the order of the blocks.

        With `norm` the last norm is applied to each of them, as DINOv2's evaluations do.
        """
        depth = len(self.blocks)
        wanted = set(range(depth - blocks, depth) if isinstance(blocks, int) else blocks)
        assert wanted <= set(range(depth)), (blocks, depth)
        group = self._tokens_of(images, None)
        layout = ((len(group), group.shape[1]),)
        tokens = group.flatten(0, 1)
        backend = self._backend_for(tokens)
        outputs = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, layout, backend)
            if number in wanted:
                outputs += self._features_of(tokens, self.norm(tokens) if norm else tokens, layout)
        return outputs

    def last_attention(self, images: Float[Tensor, "B C h w"]) -> Float[Tensor, "B H N N"]:
        """With which weights the tokens attend to each other in the last block, by head: rows sum to 1.

        Row 0 is what the class token looks at (DINO, arXiv 2104.14294, figure 1).
        """
        group = self._tokens_of(images, None)
        layout = ((len(group), group.shape[1]),)
        tokens = group.flatten(0, 1)
        backend = self._backend_for(tokens)
        for block in self.blocks[:-1]:
            tokens = block(tokens, layout, backend)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attention_weights(tokens.unflatten(0, layout[0]))

    def _tokens_of(self, images: Float[Tensor, "B C h w"], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B N D"]:
        embed = self.embed
        grid = embed.grid_of(images)
        patches = embed(images).to(self.cls_token.dtype)  # autocast embeds in bf16; the sum stays in fp32
        if mask is not None:
            assert self.mask_token is not None, "a model without mask token sees everything"
            patches = torch.where(mask[:, :, None], self.mask_token, patches)
        class_position, patch_positions = self.pos_embed[0, :1], self.pos_embed[0, 1:]
        patches = patches + resized_positions(
            patch_positions, grid, antialias=self.interpolate_antialias, offset=self.interpolate_offset
        )
        parts = [(self.cls_token + class_position).expand(len(images), -1, -1), patches]
        if self.register_tokens is not None:  # registers have no position
            parts.insert(1, self.register_tokens.expand(len(images), -1, -1))
        return torch.cat(parts, dim=1)

    def _features_of(self, prenorm: Tensor, normed: Tensor, layout: Layout) -> list[Features]:
        registers_end = 1 + self.num_register_tokens
        features = []
        for rows, crops, tokens in token_slices(layout):
            group = normed[rows].unflatten(0, (crops, tokens))
            features.append(
                Features(
                    cls=group[:, 0],
                    registers=group[:, 1:registers_end],
                    patches=group[:, registers_end:],
                    prenorm=prenorm[rows].unflatten(0, (crops, tokens)),
                )
            )
        return features

    def _backend_for(self, tokens: Tensor) -> Backend:
        device_type = tokens.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else tokens.dtype
        return choose_backend(self.attention, tokens.device, dtype)


def as_grid(patches: Float[Tensor, "B L D"], rows: int, columns: int) -> Float[Tensor, "B D rows columns"]:
    """Patch features as a picture of their grid."""
    return patches.transpose(1, 2).unflatten(2, (rows, columns))
