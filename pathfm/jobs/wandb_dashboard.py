"""`pathfm wandb-dashboard RUN`: a W&B page with a run's curves, in the order in which one looks at them."""

import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from pathfm.config import build, read_layer
from pathfm.errors import UserError
from pathfm.jobs.find_run import find_run
from pathfm.jobs.wandb_sync import demand_key
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe
from pathfm.track.dashboard import DashboardSection, Panel, as_tree, sections_of
from pathfm.track.wandb_mirror.mirror import one_line
from pathfm.track.wandb_mirror.rows import X_AXIS

_SCORES = ("acc", "balanced_acc", "auc")
_ALWAYS = ("crops", "tokens", "schedules", "losses")  # pictures that a run makes sooner or later


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run = find_run(arguments.run)
    if not run.recipe.is_file():
        raise UserError(f"{run.directory} has no {run.recipe.name}, so it is no run that began to train")
    recipe = build(Recipe, [read_layer(run.recipe)])
    name, entity = f"pathfm {run.name}", arguments.entity or recipe.wandb.username
    sections = dashboard_of(run, recipe)
    if arguments.dry_run:
        print(json.dumps(as_tree(name, entity, recipe.wandb.project, sections), indent=2))
        return 0
    print(_save(name, entity, recipe.wandb.project, sections, os.environ))
    return 0


def dashboard_of(run: Run, recipe: Recipe) -> list[DashboardSection]:
    made = {re.sub(r"_\d{3,}$", "", picture.stem) for picture in run.previews.glob("*.png")}
    pictures = [*_ALWAYS, *sorted(made - set(_ALWAYS))]
    tracked = recipe.tune.early_stopping.tracking
    return list(sections_of(recipe.dino.head_n_prototypes, _metrics_of_tuning(recipe), tracked, pictures))


def _metrics_of_tuning(recipe: Recipe) -> list[str]:
    knn = recipe.tune.knn
    if not recipe.tune.is_on:
        return []
    suffixes = [knn.suffix(number) for number in knn.n_per_class_list]
    return [f"{score}_{k}{suffix}" for suffix in suffixes for score in _SCORES for k in knn.nb_knn]


def _save(
    name: str, entity: str | None, project: str, sections: Sequence[DashboardSection], environment: Mapping[str, str]
) -> str:
    """Returns the page's address. Raises `UserError` for what is missing, or what W&B refuses."""
    workspace = _workspace(name, entity, project, sections)
    if not entity:
        raise UserError("whose page is it? name the person or team by --entity, or wandb.username in the recipe")
    demand_key(environment)
    try:
        return str(workspace.save().url)
    except Exception as error:
        raise UserError(f"W&B did not take the page ({one_line(error)})") from error


def _workspace(name: str, entity: str | None, project: str, sections: Sequence[DashboardSection]) -> Any:
    """Touches no network. Raises `UserError` where the library is not installed."""
    try:
        from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings
    except ImportError as error:
        raise UserError(
            "W&B pages are made by a library that is not installed here; pip install 'pathfm[dashboard]', "
            "or see with --dry-run what would be made"
        ) from error
    return Workspace(
        entity=entity or "",
        project=project,
        name=name,
        sections=[Section(name=one.name, panels=[_panel(p) for p in one.panels], is_open=True) for one in sections],
        settings=WorkspaceSettings(x_axis=X_AXIS),
    )


def _panel(panel: Panel) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot, MediaBrowser

    if panel.pictures:
        return MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1)
    limits = (0.0, panel.to) if panel.to is not None else (None, None)
    return LinePlot(title=panel.title, x=X_AXIS, y=list(panel.keys), range_y=limits, log_y=panel.log)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm wandb-dashboard",
        description="Make a W&B page of a run: losses, tuning, health, throughput, schedules and pictures, over the "
        "samples seen.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("--entity", help="the person or team whose page it is (default: the recipe's wandb.username)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made, as JSON; nothing is sent")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
