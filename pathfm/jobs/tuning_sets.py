"""The labelled data sets that a recipe tunes on. Without torch: login nodes look too."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pathfm.config import build, overrides_layer, read_layer
from pathfm.data.datasets import KNN, open_dataset
from pathfm.errors import UserError, listed
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger
from pathfm.recipe import Recipe
from pathfm.training.config import ALL_OF_A_CLASS, TuneConfig

_log = get_logger(__name__)


def open_tuning_sets(tune: TuneConfig) -> tuple[KNN, KNN]:
    """Query and test. Raises `UserError` where they do not belong together, or cannot give what is asked of them."""
    query, test = (_labelled(key, getattr(tune, key)) for key in ("query_dataset_path", "test_dataset_path"))
    if query.class_names != test.class_names:
        raise UserError(
            f"the query data set has the classes {listed(query.class_names)}, the test data set "
            f"{listed(test.class_names)}; index both with one CSV"
        )
    if len(in_test := np.unique(test.labels)) < 2:
        raise UserError(
            f"tune.test_dataset_path has samples of {test.class_names[in_test[0]]} alone; two classes are needed to "
            "tell whether features keep them apart"
        )
    if not tune.knn.ks(len(query)):
        raise UserError(
            f"every k of tune.knn.nb_knn={list(tune.knn.nb_knn)} exceeds the {len(query)} query samples; "
            "add a smaller one"
        )
    if tune.early_stopping.tracking not in (names := _numbers(tune, query)):
        raise UserError(
            f"tune.early_stopping.tracking={tune.early_stopping.tracking} is not found by this tuning, which has "
            f"{len(query)} query samples; take one of {listed(names, at_most=len(names))}"
        )
    return query, test


def recipe_to_follow(run: Run, overrides: Sequence[str]) -> Recipe:
    """The run's, with settings of tuning over it. Raises `UserError` when there is nothing to tune on."""
    if not run.recipe.is_file():
        raise UserError(f"run {run.name} has no {run.recipe.name} yet; start it first")
    recipe = build(Recipe, [read_layer(run.recipe), overrides_layer(overrides)])
    if not recipe.tune.is_on:
        raise UserError(
            f"run {run.name} has nothing to tune on; add tune.query_dataset_path=KNN:root=FOLDER:split=query "
            "tune.test_dataset_path=KNN:root=FOLDER:split=test"
        )
    return recipe


def warn_of_oddities(tune: TuneConfig, query: KNN, test: KNN) -> None:
    """What is no mistake, but no one should have to find out."""
    if left_out := sorted({*tune.knn.nb_knn} - {*tune.knn.ks(len(query))}):
        _log.warning("tuning leaves out k = %s: there are %d query samples", listed(map(str, left_out)), len(query))
    for one, other in ((query, test), (test, query)):
        if absent := [query.class_names[label] for label in np.setdiff1d(other.labels, one.labels)]:
            what = "they are never predicted" if one is query else "its numbers are those of the other classes"
            _log.warning("split %s has no sample of %s, split %s has; %s", one.split, listed(absent), other.split, what)


def _labelled(key: str, text: str) -> KNN:
    dataset = open_dataset(text)
    if not isinstance(dataset, KNN):
        raise UserError(f"tune.{key} needs labelled tiles, KNN:root=FOLDER:split=..., not {dataset.name}")
    if not len(dataset):
        raise UserError(f"tune.{key}={text} has no samples")
    return dataset


def _numbers(tune: TuneConfig, query: KNN) -> list[str]:
    """The names of what this tuning finds."""
    in_class = Counter(query.labels.tolist()).values()
    names = []
    for number in tune.knn.n_per_class_list:
        num_query = len(query) if number == ALL_OF_A_CLASS else sum(min(number, samples) for samples in in_class)
        names += [
            f"{metric}_{k}{tune.knn.suffix(number)}"
            for metric in ("acc", "balanced_acc", "auc")
            for k in tune.knn.ks(num_query)
        ]
    return names
