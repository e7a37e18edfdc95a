"""Tuning put together from a recipe: its data sets, and how their tiles pass the networks."""

import torch

from pathfm.dist.env import Ranks
from pathfm.jobs.tuning_sets import open_tuning_sets, warn_of_oddities
from pathfm.recipe import Recipe
from pathfm.training.step import compute_dtype
from pathfm.training.tuning import Tuner


def tuner_of(recipe: Recipe, ranks: Ranks, device: torch.device) -> Tuner | None:
    """None where nothing is to be tuned while the run trains. Raises `UserError` for data sets that will not do."""
    return build_tuner(recipe, ranks, device) if recipe.tune.is_on and recipe.tune.online else None


def build_tuner(recipe: Recipe, ranks: Ranks, device: torch.device) -> Tuner:
    """Raises `UserError` for data sets that will not do."""
    query, test = open_tuning_sets(recipe.tune)
    if ranks.is_first:
        warn_of_oddities(recipe.tune, query, test)
    return Tuner(
        query,
        test,
        recipe.tune,
        side=recipe.tile_size,
        ranks=ranks,
        device=device,
        dtype=compute_dtype(recipe.train),
        seed=recipe.train.seed,
        max_pixels=recipe.data.max_pixels,
    )
