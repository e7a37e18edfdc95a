"""Whatever can be wrong with a run is found before it waits in a queue: data, batch, folders. Without torch."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

from pathfm.config import build, read_layer
from pathfm.data.strings import parse_dataset_string
from pathfm.errors import UserError
from pathfm.jobs.named_weights import named_weights
from pathfm.jobs.training_set import open_training_set, order_of
from pathfm.jobs.tuning_sets import open_tuning_sets
from pathfm.launch.container import host_path
from pathfm.launch.profile import Container
from pathfm.parallel.config import shard_size
from pathfm.recipe import Recipe
from pathfm.training.config import TrainConfig, TuneConfig
from pathfm.training.plan import plan_training

_FOLDER_KEYS = ("root", "extra")  # of a data set string


def problems_of_run(recipe: Recipe, run_dir: Path, ranks: int, container: Container | None = None) -> Iterator[str]:
    """One line for each thing that would stop the run on `ranks` processes."""
    if place := unwritable(run_dir):
        yield f"{place} cannot be written, so the run cannot lie below it; choose another --runs-dir"
    yield from _warm_start_problems(recipe, run_dir, container or Container())
    if not recipe.train.dataset_path:
        yield "no data set is given; add train.dataset_path=Pathology:root=FOLDER"
        return
    try:
        text = _on_host(recipe.train.dataset_path, container or Container())
        order = order_of(recipe.train, open_training_set(text, recipe.student))
        train = _train_as_begun(recipe, run_dir)
        plan_training(train, recipe.optim, recipe.teacher, recipe.dino, ranks, order.epoch_size)
        shard_size(recipe.parallel, ranks, ranks)
    except UserError as error:
        yield str(error)
    yield from tuning_problems(recipe, container)


def _warm_start_problems(recipe: Recipe, run_dir: Path, container: Container) -> Iterator[str]:
    """A run that has checkpoints needs the file no more."""
    if not (named := recipe.student.pretrained_weights) or any((run_dir / "checkpoints").glob("step_*")):
        return
    try:
        named_weights(str(host_path(container, Path(expanduser(named))) or named))
    except UserError as error:
        yield f"student.pretrained_weights: {error}"


def tuning_problems(recipe: Recipe, container: Container | None = None) -> Iterator[str]:
    """One line for what would stop tuning, if the recipe asks for it."""
    try:
        if recipe.tune.is_on:
            open_tuning_sets(_tune_on_host(recipe.tune, container or Container()))
    except UserError as error:
        yield str(error)


def _train_as_begun(recipe: Recipe, run_dir: Path) -> TrainConfig:
    """A run that goes on keeps the batch of its first start, whatever ranks it is given now."""
    if not (run_dir / "recipe.yaml").exists():
        return recipe.train
    begun = build(Recipe, [read_layer(run_dir / "recipe.yaml")]).train.global_batch_size
    return recipe.train.model_copy(update={"global_batch_size": recipe.train.global_batch_size or begun})


def unwritable(folder: Path) -> Path | None:
    """What stands in the way of making this folder, or of writing into it; None when nothing does."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return None if place.is_dir() and os.access(place, os.W_OK | os.X_OK) else place


def stop_at(problems: Sequence[str]) -> None:
    """Raise `UserError` with all the problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 1} more: {'; '.join(problems[1:])})" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def data_folders(recipe: Recipe) -> list[Path]:
    """The folders that the recipe's data sets and weights lie in, as the trainer will see them."""
    of_training = folders_of(recipe.train.dataset_path) if recipe.train.dataset_path else []
    return list(dict.fromkeys([*of_training, *tuning_folders(recipe), *_weights_folders(recipe)]))


def _weights_folders(recipe: Recipe) -> list[Path]:
    """Of the file or run that training begins from; nothing is looked up where it lies on this host otherwise."""
    if not (named := recipe.student.pretrained_weights):
        return []
    try:
        path = named_weights(named).path
    except UserError:
        path = Path(expanduser(named))
    return [path.absolute().parent] if path else []


def tuning_folders(recipe: Recipe) -> list[Path]:
    """Likewise of the data sets that it tunes on, if it does."""
    named = (recipe.tune.query_dataset_path, recipe.tune.test_dataset_path) if recipe.tune.is_on else ()
    return list(dict.fromkeys(folder for dataset in named if dataset for folder in folders_of(dataset)))


def folders_of(dataset: str) -> list[Path]:
    """The folders that a data set string names. Raises `UserError` for one that is none."""
    options = parse_dataset_string(dataset).options
    return [Path(expanduser(options[key])).absolute() for key in _FOLDER_KEYS if key in options]


def _tune_on_host(tune: TuneConfig, container: Container) -> TuneConfig:
    given: dict[str, str] = {key: getattr(tune, key) for key in ("query_dataset_path", "test_dataset_path")}
    return tune.model_copy(update={key: _on_host(text, container) for key, text in given.items()})


def _on_host(dataset: str, container: Container) -> str:
    """The data set string as this host has to read it, when the container shows its folders at other places."""
    parsed = parse_dataset_string(dataset)
    options = dict(parsed.options)
    for key in _FOLDER_KEYS:
        if key in options and (place := host_path(container, Path(options[key]))):
            options[key] = str(place)
    return str(replace(parsed, options=options))
