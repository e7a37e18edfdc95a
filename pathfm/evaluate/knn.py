"""k nearest neighbours weighted by similarity, as DINO and DINOv2 score frozen features (arXiv 2104.14294, appendix F).

N labelled (query) samples   T test samples   D width   C classes
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from pathfm.errors import UserError


def knn_probabilities(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "T D"],
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Float[Tensor, "T C"]:
    """Each neighbour votes with exp(cosine / temperature); rows sum to 1. Raises `UserError` when k exceeds N."""
    if not 1 <= k <= len(train_features):
        raise UserError(f"k={k} neighbours are asked of {len(train_features)} labelled samples")
    train = normalize(train_features.float(), dim=1)
    votes = one_hot(train_labels, num_classes).float()
    parts = []
    for test in normalize(test_features.float(), dim=1).split(chunk):
        similarity, neighbour = (test @ train.T).topk(k, dim=1)
        weights = torch.softmax(similarity / temperature, dim=1)
        parts.append((weights[:, :, None] * votes[neighbour]).sum(1))
    return torch.cat(parts)


def accuracy(probabilities: Float[Tensor, "T C"], labels: Int[Tensor, " T"]) -> float:
    """The share of test samples whose most probable class is theirs."""
    return (probabilities.argmax(1) == labels).double().mean().item()
