"""Recorded arrays, a DINOv2 of the size of the recorded steps, and batches for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pathfm.batch import Batch
from pathfm.models.vit import ViT
from pathfm.ssl.config import Centering, DinoConfig, IbotConfig
from pathfm.ssl.dinov2 import DINOv2

FILES = ("dinov2_step_centering_shared.npz", "dinov2_step_sinkhorn_separate.npz")

PATCHES = 36  # of a global crop of 84 px


class Recorded:
    """A golden file's arrays as tensors."""

    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays.files if key.startswith(prefix)}


def small_dinov2(
    *,
    separate_head: bool = False,
    centering: Centering = "centering",
    koleo_group_size: int | None = None,
    num_register_tokens: int = 0,
    drop_path_rate: float = 0.0,
) -> DINOv2:
    def backbone(rate: float) -> ViT:
        return ViT(
            image_size=84,
            patch_size=14,
            width=36,
            num_heads=3,
            drop_path_rates=[rate] * 2,
            layerscale=0.1,
            num_register_tokens=num_register_tokens,
        )

    torch.manual_seed(0)
    return DINOv2(
        backbone(drop_path_rate),
        backbone(0.0),
        DinoConfig(head_n_prototypes=64, head_bottleneck_dim=12, head_hidden_dim=40),
        IbotConfig(separate_head=separate_head, head_n_prototypes=80, head_bottleneck_dim=10, head_hidden_dim=36),
        centering=centering,
        koleo_group_size=koleo_group_size,
    )


def random_batch(num_samples: int = 4, num_local: int = 3, *, masked_share: float = 0.3, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2 * num_samples, PATCHES, generator=generator) < masked_share
    batch = Batch(
        global_crops=torch.randn(2 * num_samples, 3, 84, 84, generator=generator),
        local_crops=torch.randn(num_local * num_samples, 3, 42, 42, generator=generator),
        masks=masks,
        mask_indices=torch.empty(0, dtype=torch.long),
        mask_weights=torch.empty(0),
        positions=torch.arange(num_samples),
        samples=torch.arange(num_samples),
    )
    return with_masks(batch, masks)


def with_masks(batch: Batch, masks: torch.Tensor) -> Batch:
    weights = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]
    return replace(batch, masks=masks, mask_indices=masks.flatten().nonzero().flatten(), mask_weights=weights)


def shares_of(batch: Batch, num_ranks: int) -> list[Batch]:
    """A global batch split into equal rank batches of consecutive samples."""
    share = batch.num_samples // num_ranks
    shares = []
    for rank in range(num_ranks):
        rows = slice(rank * share, (rank + 1) * share)

        def of_rank(view_major: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            return view_major.unflatten(0, (-1, batch.num_samples))[:, rows].flatten(0, 1)

        part = replace(
            batch,
            global_crops=of_rank(batch.global_crops),
            local_crops=of_rank(batch.local_crops),
            positions=batch.positions[rows],
            samples=batch.samples[rows],
        )
        shares.append(with_masks(part, of_rank(batch.masks)))
    return shares


def spread_out(method: DINOv2) -> None:
    """Weights for which features differ clearly: near zero they almost coincide, and rounding would decide who is
    whose nearest neighbour."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in (method.student, method.teacher):
            generator.manual_seed(5)
            for parameter in network.parameters():
                if parameter.ndim > 1 and parameter.shape[-1] > 1:
                    parameter.normal_(0, 0.2, generator=generator)
