"""What a command's WEIGHTS means: a file, a run, or random weights of a recipe. Without torch: login nodes look too."""

from dataclasses import dataclass
from pathlib import Path

from pathfm.config import read_layer
from pathfm.errors import UserError
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.find_run import RUNS, is_run
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe, find_config, read_recipe

RANDOM = "random:"
_USUAL_SIDE = 224  # px; DINOv2's evaluations


@dataclass(frozen=True)
class NamedWeights:
    """Weights that a command line names."""

    text: str
    label: str  # a name for files that are made of them
    path: Path | None = None  # None: random
    recipe: str = ""  # of random ones

    @property
    def side(self) -> int:
        """Px at which the backbone was trained to see tiles, as far as a recipe says; else DINOv2's 224."""
        if self.path is None:
            return recipe_of(self).tile_size
        recipe = self.path.absolute().parent.parent / "recipe.yaml"
        if not recipe.is_file():
            return _USUAL_SIDE
        tree = read_layer(recipe).tree
        tune, crops = (tree.get(group) or {} for group in ("tune", "crops"))
        return int(tune.get("tile_size") or crops.get("global_crops_size") or _USUAL_SIDE)


def named_weights(text: str, runs_dir: Path = RUNS) -> NamedWeights:
    """Raises `UserError` for what is not there, or is a run that has exported nothing."""
    if text.startswith(RANDOM):
        recipe = text.removeprefix(RANDOM)
        named = NamedWeights(text, f"random_{Path(recipe).stem}", recipe=recipe)
        recipe_of(named)
        return named
    path = next((place for place in (Path(text).expanduser(), runs_dir / text) if place.exists()), None)
    if path is None:
        raise UserError(f"there is no {text}; name a file of weights, a run's directory, or random:RECIPE")
    if path.is_dir() and is_run(Run(path)):
        path = _export_of(Run(path))
    return NamedWeights(text, _label(path), path)


def recipe_of(named: NamedWeights) -> Recipe:
    """Of random weights."""
    return read_recipe(find_config(named.recipe, CONFIGS)).recipe


def _export_of(run: Run) -> Path:
    if (teacher := run.teacher_to_use()) is None:
        raise UserError(f"run {run.name} has exported no teacher yet; checkpoint.export_every_steps says when it does")
    return teacher


def _label(path: Path) -> str:
    """`runs/NAME/exports/teacher_00012000.pth` -> `NAME_teacher_00012000`."""
    run = path.absolute().parents[1].name if path.absolute().parent.name == "exports" else ""
    return "_".join(filter(None, (run, path.stem if path.is_file() else path.absolute().name)))
