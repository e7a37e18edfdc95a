"""The backbone that `random:RECIPE` names: what training has to beat."""

import torch

from pathfm.jobs.named_weights import NamedWeights, recipe_of
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.vit import ViT


def random_backbone(named: NamedWeights, torch_seed: int) -> tuple[ViT, StudentConfig]:
    """The same for the same seed; torch's own generator is left as it was."""
    recipe = recipe_of(named)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed)
        vit = build_backbone(recipe.student, recipe.crops.global_crops_size, drop_path=False, has_mask_token=False)
    return vit.eval().requires_grad_(False), recipe.student
