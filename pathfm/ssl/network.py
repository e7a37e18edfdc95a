"""A backbone with its heads, called as one: crops in, class tokens and what the prototypes are compared with out.

B crops of a group   C crops of all groups   L patches of a crop   M patches that are asked for
D width   K prototypes of the class tokens' head   Kp of the patches' head
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pathfm.models.head import DINOHead, Projection
from pathfm.models.vit import ViT


class Output(NamedTuple):
    """A named tuple, not a dataclass: sharding looks for tensors in what a module returns, and knows tuples alone."""

    cls: Float[Tensor, "C D"]  # of all crops, group after group
    projected_cls: Projection | None  # [C, E], [K, E]; None without heads
    projected_patches: Projection | None  # [M, E], [Kp, E]; None when no patch was asked for


class Network(nn.Module):
    """`backbone`, `dino_head` and, when the patches have a head of their own, `ibot_head`: the exported prefixes."""

    def __init__(self, backbone: ViT, dino_head: DINOHead, ibot_head: DINOHead | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        if ibot_head is not None:
            self.ibot_head = ibot_head

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        patches: Int[Tensor, " M"] | None = None,
        heads: bool = True,
    ) -> Output:
        """All groups of crops in one pass (see `ViT.forward`); `patches`: flat positions in the first group's [B, L].

        Everything goes through here, also where no head is wanted: what shards the weights gathers them at this call.
        """
        groups = self.backbone(crops, masks)
        cls = torch.cat([group.cls for group in groups])
        if not heads:
            return Output(cls, None, None)
        if patches is None:
            return Output(cls, self.dino_head(cls), None)
        asked = groups[0].patches.flatten(0, 1).index_select(0, patches)
        if hasattr(self, "ibot_head"):
            return Output(cls, self.dino_head(cls), self.ibot_head(asked))
        projected = self.dino_head(torch.cat([cls, asked]))  # a shared head runs once over both
        return Output(cls, *projected.split(len(cls)))

    def layers(self) -> list[nn.Module]:
        """The blocks: what is recomputed, compiled and gathered one by one."""
        return list(self.backbone.blocks)

    def parts(self) -> dict[str, nn.Module]:
        """The backbone and every head, by name."""
        return dict(self.named_children())
