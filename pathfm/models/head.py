"""The projection head of DINO and iBOT: tokens -> prototype logits.

N tokens (class tokens, or masked patches: any rows)   D width   E bottleneck width   K prototypes
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_BATCH_NORM_EPS = 1e-5  # torch's


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (arXiv 1602.07868); g starts at 1."""

    def __init__(self, in_width: int, out_width: int, *, learn_norm: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_width, 1), requires_grad=learn_norm)
        self.weight_v = nn.Parameter(torch.empty(out_width, in_width))

    def forward(self) -> Float[Tensor, "K E"]:
        """The layer's matrix, in fp32."""
        return _RowsOfLength.apply(self.weight_v, self.weight_g)


class _RowsOfLength(torch.autograd.Function):
    """g * v / |v|, row by row. With a gradient of its own, because the matrix is large: autograd's goes over it twice
    as often."""

    @staticmethod
    def forward(ctx: Any, directions: Tensor, lengths: Tensor) -> Tensor:
        of_directions = torch.linalg.vector_norm(directions, dim=1, keepdim=True, dtype=torch.float32)
        ctx.save_for_backward(directions, lengths, of_directions)
        return directions * (lengths / of_directions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        directions, lengths, of_directions = ctx.saved_tensors
        along = (gradient * directions).sum(1, keepdim=True)
        across = torch.addcmul(gradient, directions, along / of_directions.square(), value=-1)
        return across.mul_(lengths / of_directions), along / of_directions


Total = Callable[[Tensor], Tensor]


class BatchNorm(nn.Module):
    """Normalisation by the statistics of the rows of all ranks (arXiv 1502.03167), in training and evaluation alike.

    The teacher too normalises by what it is just shown, as DINO's does, so there are no running averages.
    `total` sums over ranks and can be differentiated.
    """

    def __init__(self, width: int, total: Total) -> None:
        super().__init__()
        self.total = total
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float()
            number = rows.new_full((1,), len(rows))
            sums = self.total(torch.cat([rows.sum(0), number]))
            centred = rows - sums[:-1] / sums[-1]
            variance = self.total(centred.square().sum(0)) / sums[-1]
            return centred * (variance + _BATCH_NORM_EPS).rsqrt() * self.weight.float() + self.bias.float()


class Projection(NamedTuple):
    """Rows just before the prototypes: logits are made where they are needed, for all of them would be too large."""

    bottleneck: Float[Tensor, "N E"]  # normalised, in fp32
    prototypes: Float[Tensor, "K E"]

    def logits(self) -> Float[Tensor, "N K"]:
        return functional.linear(self.bottleneck, self.prototypes)

    def split(self, num_rows: int) -> tuple["Projection", "Projection"]:
        """The first rows, and the others."""
        first, others = self.bottleneck[:num_rows], self.bottleneck[num_rows:]
        return Projection(first, self.prototypes), Projection(others, self.prototypes)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised prototypes (DINO, arXiv 2104.14294, appendix C).

    `norm_last_layer` fixes the prototypes' length at 1 (DINO's option for stability; DINOv2 learns it).
    `batch_norm_total` puts `BatchNorm` before every GELU (DINO's option).
    """

    def __init__(
        self,
        width: int,
        *,
        num_prototypes: int,
        bottleneck_width: int = 256,
        hidden_width: int = 2048,
        num_layers: int = 3,
        norm_last_layer: bool = False,
        batch_norm_total: Total | None = None,
    ) -> None:
        super().__init__()
        self.mlp = _mlp(width, hidden_width, bottleneck_width, num_layers, batch_norm_total)
        self.last_layer = WeightNormLinear(bottleneck_width, num_prototypes, learn_norm=not norm_last_layer)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Truncated normal weights, zero biases, prototypes of length 1, from torch's default generator."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.ones_(self.last_layer.weight_g)
        nn.init.trunc_normal_(self.last_layer.weight_v, std=0.02)

    def forward(self, tokens: Float[Tensor, "N D"]) -> Projection:
        """N may be 0: a batch without masked patches still gives every parameter a gradient."""
        bottleneck = self.mlp(tokens)
        smallest = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return Projection(functional.normalize(bottleneck.float(), dim=-1, eps=smallest), self.last_layer())


def _mlp(width: int, hidden: int, out: int, num_layers: int, batch_norm_total: Total | None) -> nn.Module:
    if num_layers == 1:
        return nn.Linear(width, out)
    layers: list[nn.Module] = []
    for in_width in [width] + [hidden] * (num_layers - 2):
        layers.append(nn.Linear(in_width, hidden))
        if batch_norm_total is not None:
            layers.append(BatchNorm(hidden, batch_norm_total))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(hidden, out))
