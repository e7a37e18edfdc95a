"""The projection head of DINO and iBOT: tokens -> prototype logits.

N tokens (class tokens, or masked patches: any rows)   D width   E bottleneck width   K prototypes
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (arXiv 1602.07868); g starts at 1."""

    def __init__(self, in_width: int, out_width: int, *, learn_norm: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_width, 1), requires_grad=learn_norm)
        self.weight_v = nn.Parameter(torch.empty(out_width, in_width))

    def forward(self, rows: Float[Tensor, "N E"]) -> Float[Tensor, "N K"]:
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True, dtype=torch.float32)
        return functional.linear(rows, self.weight_v * (self.weight_g / lengths))


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised prototypes (DINO, arXiv 2104.14294, appendix C).

    `norm_last_layer` fixes the prototypes' length at 1 (DINO's option for stability; DINOv2 learns it).
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
    ) -> None:
        super().__init__()
        self.mlp = _mlp(width, hidden_width, bottleneck_width, num_layers)
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

    def forward(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Prototype logits. N may be 0: a batch without masked patches still gives every parameter a gradient."""
        return self.last_layer(self.embed(tokens))

    def embed(self, tokens: Float[Tensor, "N D"]) -> Float[Tensor, "N E"]:
        """The normalised bottleneck, in fp32."""
        bottleneck = self.mlp(tokens)
        smallest = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        return functional.normalize(bottleneck.float(), dim=-1, eps=smallest)


def _mlp(width: int, hidden: int, out: int, num_layers: int) -> nn.Module:
    if num_layers == 1:
        return nn.Linear(width, out)
    layers: list[nn.Module] = [nn.Linear(width, hidden), nn.GELU()]
    for _ in range(num_layers - 2):
        layers += [nn.Linear(hidden, hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))
