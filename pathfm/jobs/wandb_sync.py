"""`pathfm wandb-sync RUN...`: sends to W&B's server what it does not have of runs, from the runs' own files."""

import os
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence

from pathfm.config import build, read_layer
from pathfm.errors import UserError
from pathfm.jobs.find_run import find_run
from pathfm.lifecycle.run import Run
from pathfm.log import progress, start_logging
from pathfm.recipe import Recipe
from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.mirror import Mirror, one_line, only_mirror
from pathfm.track.wandb_mirror.rows import Row
from pathfm.track.weights_and_biases import has_key


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    start_logging()
    runs = [find_run(name) for name in arguments.runs]
    recipes = [_recipe_of(run, arguments.project) for run in runs]
    demand_key(os.environ)
    for run, recipe in zip(runs, recipes, strict=True):
        sync(run, recipe)
    return 0


def sync(run: Run, recipe: Recipe) -> None:
    """Offline files are not needed: their rows are made anew. Raises `UserError` when the server does not take them."""
    with only_mirror(run.directory) as alone:
        if not alone:
            raise UserError(f"run {run.name} is being shown to W&B by another process; wait until that has ended")
        mirror = Mirror(run.directory, "online", recipe.wandb, recipe.model_dump(mode="json"))
        counter = _Counter()
        try:
            mirror.look(counter.counted)
            url = mirror.url
            mirror.finish()
        except Exception as error:
            mirror.abandon()
            raise UserError(
                f"W&B did not take run {run.name} ({one_line(error)}); the same command goes on from there"
            ) from error
    print(f"{run.name}: {counter.rows:,} rows were missing and are sent: {url}")


def demand_key(environment: Mapping[str, str]) -> None:
    if not has_key(environment):
        raise UserError("there is no key for W&B; set WANDB_API_KEY, or run 'wandb login' on this machine")


class _Counter:
    """Shows how far it is, and remembers how many there were."""

    rows = 0

    def counted(self, rows: Sequence[Row]) -> Iterable[Row]:
        self.rows = len(rows)
        return progress(rows, "sending", unit="rows")


def _recipe_of(run: Run, project: str | None) -> Recipe:
    """Raises `UserError` for a run that was never meant for W&B, unless a project is named."""
    if not run.recipe.is_file():
        raise UserError(f"{run.directory} has no {run.recipe.name}, so it is no run that began to train")
    recipe = build(Recipe, [read_layer(run.recipe)])
    if project:
        return recipe.model_copy(update={"wandb": recipe.wandb.model_copy(update={"project": project})})
    if not had_wandb(run, recipe.wandb):
        raise UserError(f"run {run.name} was not shown to W&B so far; name the project by --project")
    return recipe


def had_wandb(run: Run, config: WandbConfig) -> bool:
    return config.enable or bool(config.resume_id) or (run.directory / "wandb_id").is_file()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm wandb-sync",
        description="Send to W&B what it does not have of these runs: all of one that trained offline, the rest of one "
        "whose connection failed. Again sends nothing twice.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="runs' directories, or their names in runs/")
    parser.add_argument("--project", help="of W&B (default: the recipe's wandb.project)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
