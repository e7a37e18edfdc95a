"""How much arithmetic a sample takes, and how much of what a GPU can do that is (MFU, arXiv 2204.02311, appendix B)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from pathfm.models.drop_path import share_computed
from pathfm.models.layers import Block
from pathfm.ssl.network import Network

# Dense bf16 or fp16 TFLOP/s of the makers' data sheets, by what the driver calls a GPU; the first that fits counts.
_PEAKS = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("RTX 6000 Ada", 364.0),
    ("A6000", 155.0),
    ("A40", 150.0),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


@dataclass(frozen=True)
class Crops:
    """Crops of one sample that pass a network: tokens of each, patches with a prediction of their own among them."""

    tokens: tuple[int, ...]
    asked_patches: float = 0.0  # on average


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one GPU in half precision; None for a CPU, fp32, and GPUs that the table has not."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in _PEAKS if known in name), None)


def flops_per_sample(network: Network, student: Crops, teacher: Crops) -> float:
    """Of a training step: the student forward and, twice as much, backward, the teacher forward.

    2 for each weight and token, and 4 x tokens x width in each block's attention for each token; pixels get no
    gradient, recomputation does not count, nor do crops for which drop path leaves a block's branch out.
    """
    shares = [share_computed(cast(Block, block).drop_path_rate) for block in network.layers()]
    of_student = 3 * _forward(network, student, shares) + 2 * _embedding(network, student)
    return of_student + _forward(network, teacher, [1.0] * len(shares)) + _embedding(network, teacher)


def _embedding(network: Network, crops: Crops) -> float:
    prefix = 1 + network.backbone.num_register_tokens
    return 2 * _weights(network.backbone.embed) * sum(tokens - prefix for tokens in crops.tokens)


def _forward(network: Network, crops: Crops, shares: Sequence[float]) -> float:
    """Behind the embedding; `shares`: of the crops, those that each block computes."""
    attention = sum(4 * tokens * tokens * network.backbone.width for tokens in crops.tokens)
    blocks = sum(
        share * (2 * _weights(block) * sum(crops.tokens) + attention)
        for block, share in zip(network.backbone.blocks, shares, strict=True)
    )
    patch_head = getattr(network, "ibot_head", network.dino_head)
    heads = len(crops.tokens) * _weights(network.dino_head) + crops.asked_patches * _weights(patch_head)
    return blocks + 2 * heads


def _weights(module: nn.Module) -> int:
    """Of the whole module, also where a rank holds a share of it."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Usage:
    """Of this rank's GPU; both numbers are None without one."""

    device: torch.device
    flops_per_sample: float
    peak_flops: float | None  # of all ranks' GPUs together

    def lap(self, samples_per_second: float) -> dict[str, float | None]:
        """Share of the peak, and the most memory that tensors took since this was last asked, in GiB."""
        mfu = samples_per_second * self.flops_per_sample / self.peak_flops if self.peak_flops else None
        if self.device.type != "cuda":
            return {"mfu": mfu, "gpu_memory_gib": None}
        most = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"mfu": mfu, "gpu_memory_gib": most}
