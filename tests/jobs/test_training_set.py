"""Which data a recipe may be trained on and what an epoch takes of its cohorts, also before the queue."""

import numpy as np
import pytest
import torch
import yaml

from pathfm.config import Layer, build
from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import KNN
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError
from pathfm.jobs.before_queue import problems_of_run
from pathfm.jobs.training_data import TrainingData
from pathfm.jobs.training_set import open_training_set, order_of
from pathfm.models.config import StudentConfig
from pathfm.recipe import Recipe, changes_of_identity, read_recipe
from pathfm.training.plan import plan_training
from tests.jobs.journeys import TINY, make_tiles

IMAGES, FEATURES = StudentConfig(), StudentConfig(feature_width=384, patch_size=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 tiles as a cohort 'all' and as a cohort 'some' of the first ten, concatenated."""
    root = tmp_path_factory.mktemp("training_set")
    make_tiles(root)
    for name in ("all", "some"):
        folder = root / name
        folder.mkdir()
        for tile in sorted((root / "tiles").iterdir())[: 10 if name == "some" else None]:
            (folder / tile.name).symlink_to(tile)
        pack(PackRequest(folder, name, root / "data", cohort=True))
    concat(ConcatRequest(root / "data", root / "cohorts"))
    return root


@pytest.fixture
def cohorts(root):
    return f"PathologyFoundation:root={root / 'data'}:extra={root / 'cohorts'}"


def recipe_with(text, **train):
    settings = {"dataset_path": text, "device": "cpu", **train}
    return build(Recipe, [Layer("tiny", yaml.safe_load(TINY)), Layer("the test", {"train": settings})])


def test_an_epoch_is_what_the_weights_leave_of_the_data(cohorts):
    dataset = open_training_set(cohorts, IMAGES)
    assert order_of(recipe_with(cohorts).train, dataset).epoch_size == 50
    weighed = recipe_with(cohorts, cohorts={"all": 0.5, "some": 3}, cohort_cap=25)
    order = order_of(weighed.train, dataset)
    samples = order.samples(np.arange(order.epoch_size))
    assert ((samples < 40).sum(), (samples >= 40).sum()) == (20, 25)


def test_a_weight_beyond_all_counting_is_refused(cohorts):
    with pytest.raises(UserError, match=r"train.cohorts.all: should be less than or equal to 1000000"):
        recipe_with(cohorts, cohorts={"all": 1e300})


def test_a_runs_batches_hold_the_samples_of_its_order(cohorts):
    recipe = recipe_with(cohorts, cohorts={"all": 0, "some": 2})
    dataset = open_training_set(cohorts, IMAGES)
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, 1, 20)
    assert plan.epoch_length == 2
    data = TrainingData(recipe, plan, dataset, torch.device("cpu"))
    batch = data.first_samples(8)
    assert batch.samples.tolist() == data.order.samples(np.arange(8)).tolist()
    assert min(batch.samples.tolist()) >= 40


@pytest.mark.parametrize("split", ["query", "test"])
def test_labelled_sets_may_be_trained_on(root, split):
    (root / "downstream").mkdir(exist_ok=True)
    tar = root / "downstream" / "downstream_dataset.tar"
    if not tar.exists():
        tar.symlink_to(root / "data" / "all.tar")
    build_index(IndexRequest(tar, root / "downstream", split))
    dataset = open_training_set(f"KNN:root={root / 'downstream'}:split={split}", IMAGES)
    assert isinstance(dataset, KNN)
    assert order_of(recipe_with("").train, dataset).epoch_size == 40


def test_features_are_not_what_a_student_of_images_reads(tmp_path):
    torch.save(torch.zeros(256, 384), tmp_path / "region.pt")
    assert len(open_training_set(f"Regions:root={tmp_path}", FEATURES)) == 1
    with pytest.raises(UserError, match=r"Regions holds features of patches.* set student\.feature_width"):
        open_training_set(f"Regions:root={tmp_path}", IMAGES)


def test_images_are_not_what_a_student_of_features_reads(cohorts):
    with pytest.raises(UserError, match=r"holds images, but the student reads features.*pathfm extract --regions"):
        open_training_set(cohorts, FEATURES)


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"cohorts": {"al": 2.0}}, "no cohort 'al'; did you mean 'all'?; there are: all, some"),
        ({"cohorts": {"all": 0}, "batch_size_per_gpu": 16}, "batch of 16 is larger than an epoch of 10 samples"),
        ({"cohorts": {"all": 0, "some": 0}}, "leaves no cohort"),
        ({"cohort_cap": 3, "global_batch_size": 8}, "batch of 8 is larger than an epoch of 6 samples"),
    ],
)
def test_what_is_wrong_with_the_weights_is_found_before_the_queue(cohorts, tmp_path, train, problem):
    problems = list(problems_of_run(recipe_with(cohorts, **train), tmp_path / "run", ranks=1))
    assert [problem in found for found in problems] == [True]


def test_pathology_has_one_cohort_to_weigh(root):
    text = f"Pathology:root={root / 'data'}"
    dataset = open_training_set(text, IMAGES)
    assert order_of(recipe_with(text, cohorts={"pretrain": 0.5}).train, dataset).epoch_size == 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.cohorts.tcga=-1", "train.cohorts.tcga: should be greater than or equal to 0, not -1"),
        ("train.cohorts.tcga=.inf", "train.cohorts.tcga: should be a finite number, not inf"),
        ("train.cohorts.tcga=much", "train.cohorts.tcga: should be a valid number"),
        ("train.cohort_cap=0", "train.cohort_cap: should be greater than or equal to 1, not 0"),
        ("train.cohort={a: 1}", "no key 'train.cohort'; the nearest known key is 'train.cohorts'"),
    ],
)
def test_weights_that_are_none_are_one_line(override, said):
    with pytest.raises(UserError) as caught:
        read_recipe(None, [override])
    assert said in str(caught.value)


def test_the_mixture_is_part_of_a_runs_identity():
    weighed, capped = (read_recipe(None, [word]).recipe for word in ("train.cohorts={tcga: 0.5}", "train.cohort_cap=9"))
    assert changes_of_identity(Recipe(), weighed) == ["train.cohorts.tcga: None -> 0.5"]
    assert changes_of_identity(weighed, read_recipe(None, ["train.cohorts.tcga=0.25"]).recipe)
    assert changes_of_identity(Recipe(), capped) == ["train.cohort_cap: None -> 9"]
