"""A recipe's student and teacher, and with what training begins on a device and over the ranks."""

import torch

from pathfm.dist.collect import gather_rows, sum_over_ranks, sum_with_gradient
from pathfm.dist.env import Ranks
from pathfm.jobs.warm_start import freeze_blocks
from pathfm.parallel.apply import mesh_of, parallelise
from pathfm.parallel.config import shard_size
from pathfm.parallel.float8 import use_float8
from pathfm.random_streams import derived_seed
from pathfm.recipe import Recipe
from pathfm.ssl.build import build_method
from pathfm.ssl.dinov2 import DINOv2
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, compute_dtype


def method_of(recipe: Recipe, koleo_group_size: int) -> DINOv2:
    """On torch's default device, with the initial weights that follow from the recipe's seed, frozen as it says."""
    torch.manual_seed(derived_seed(recipe.train.seed, 0, "initial weights"))
    method = build_method(
        recipe.method,
        recipe.student,
        recipe.crops.global_crops_size,
        recipe.dino,
        recipe.ibot,
        centering=recipe.train.centering,
        koleo_group_size=koleo_group_size,
        total=sum_over_ranks,
        total_with_gradient=sum_with_gradient,
        gather=gather_rows,
    )
    freeze_blocks(method.student.backbone, recipe.student.freeze_blocks)
    return method


def fresh_state(method: DINOv2, recipe: Recipe, ranks: Ranks, device: torch.device) -> TrainingState:
    """What training begins with: the method on the device and over the ranks, recomputed and compiled as the recipe
    says, and an optimiser that has seen nothing. All ranks call this together.
    """
    method.to(device)
    if recipe.train.precision == "fp8":
        use_float8([*method.student.layers(), *method.teacher.layers()], device)
    mesh = mesh_of(ranks.world_size, shard_size(recipe.parallel, ranks.world_size, ranks.ranks_per_node), device)
    for network, trained in ((method.student, True), (method.teacher, False)):
        parallelise(network, network.layers(), recipe.parallel, mesh, compute_dtype(recipe.train), trained=trained)
    if recipe.parallel.compile:
        method.compile_losses()
    return TrainingState(method, build_optimizer(method, recipe.optim), build_loss_scale(recipe.train, device))
