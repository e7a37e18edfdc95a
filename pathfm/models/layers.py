"""The parts of a vision transformer block, on packed tokens, with the official checkpoints' names.

T tokens of all crops together   D width   B crops   L patches of a crop   h, w crop size in pixels, or for
patch features rows and columns of their grid   C width of patch features   N tokens of a crop   H heads
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pathfm.errors import UserError
from pathfm.models.attention import Backend, Layout, attend
from pathfm.models.config import FeedForward
from pathfm.models.drop_path import Drawn, add_branch, draw

NORM_EPS = 1e-6  # DINOv2's models


class PatchEmbed(nn.Module):
    """Non-overlapping square patches, projected linearly."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def grid_of(self, images: Float[Tensor, "B 3 h w"]) -> tuple[int, int]:
        """Rows and columns of patches. Raises `UserError` when the crop is not a whole number of patches."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"a crop of {height}x{width} px is not a whole number of {self.patch_size} px patches")
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B L D"]:
        return self.proj(images).flatten(2).transpose(1, 2)


class FeatureEmbed(nn.Sequential):
    """A grid of patch features as tokens: a linear layer and a GELU (HIPT, arXiv 2206.02647, appendix A)."""

    def __init__(self, feature_width: int, width: int) -> None:
        super().__init__(nn.Linear(feature_width, width), nn.GELU())
        self.feature_width = feature_width

    def grid_of(self, features: Float[Tensor, "B C h w"]) -> tuple[int, int]:
        """Rows and columns of the grid. Raises `UserError` for features of another width."""
        if features.shape[1] != self.feature_width:
            raise UserError(f"features are {features.shape[1]} wide, the model reads {self.feature_width}")
        return features.shape[2], features.shape[3]

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B L D"]:
        return super().forward(features.flatten(2).transpose(1, 2))


class Norm(nn.LayerNorm):
    """Layer norm in fp32, also when its weights come gathered in half precision."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return functional.layer_norm(
            tokens.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class Attention(nn.Module):
    """Multi-head self-attention within every crop."""

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool, proj_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width, bias=proj_bias)

    def forward(self, tokens: Float[Tensor, "T D"], layout: Layout, backend: Backend) -> Float[Tensor, "T D"]:
        query, key, value = self.qkv(tokens).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return self.proj(attend(query, key, value, layout, backend).flatten(1))


class Mlp(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.fc2(functional.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """silu(a) * b with a, b from one linear layer (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        # Two thirds keep the parameter count of the plain MLP; a multiple of 8 suits the matrix units.
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        gate, content = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * content)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return tokens * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: attention, then feed-forward, each on its residual branch."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        ffn_layer: FeedForward = "mlp",
        mlp_ratio: float = 4.0,
        layerscale: float = 1e-5,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
    ) -> None:
        super().__init__()
        feed_forward = Mlp if ffn_layer == "mlp" else SwiGLU
        self.drop_path_rate = drop_path_rate
        self.norm1 = Norm(width)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.ls1 = LayerScale(width, layerscale) if layerscale else nn.Identity()
        self.norm2 = Norm(width)
        self.mlp = feed_forward(width, int(width * mlp_ratio), ffn_bias)
        self.ls2 = LayerScale(width, layerscale) if layerscale else nn.Identity()

    def forward(self, tokens: Float[Tensor, "T D"], layout: Layout, backend: Backend) -> Float[Tensor, "T D"]:
        rate = self.drop_path_rate if self.training else 0.0
        of_attention, of_feed_forward = (draw(tokens, layout, rate) for _ in range(2))
        return self.compute(tokens, layout, backend, of_attention, of_feed_forward)

    def compute(
        self,
        tokens: Float[Tensor, "T D"],
        layout: Layout,
        backend: Backend,
        of_attention: Drawn,
        of_feed_forward: Drawn,
    ) -> Float[Tensor, "T D"]:
        """All of the arithmetic and nothing that is drawn: what may be recomputed and compiled."""
        tokens = add_branch(tokens, layout, partial(self._attend, backend=backend), of_attention)
        return add_branch(tokens, layout, self._feed_forward, of_feed_forward)

    def attention_weights(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B H N N"]:
        """How much every token (row) attends to every other in this block, by head: rows sum to 1."""
        qkv = self.attn.qkv(self.norm1(tokens.flatten(0, 1))).unflatten(1, (3, self.attn.num_heads, -1))
        query, key, _ = qkv.unflatten(0, tokens.shape[:2]).unbind(2)
        scores = torch.einsum("bnhe,bmhe->bhnm", query.float(), key.float()) / query.shape[-1] ** 0.5
        return scores.softmax(dim=-1)

    def _attend(self, tokens: Float[Tensor, "T D"], layout: Layout, backend: Backend) -> Float[Tensor, "T D"]:
        return self.ls1(self.attn(self.norm1(tokens), layout, backend))

    def _feed_forward(self, tokens: Float[Tensor, "T D"], _: Layout) -> Float[Tensor, "T D"]:
        return self.ls2(self.mlp(self.norm2(tokens)))
