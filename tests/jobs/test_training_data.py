"""A run's batches, cropped by the loader's workers or by the training device."""

import math
from contextlib import ExitStack

import pytest
import torch
import yaml

from pathfm.config import Layer, build
from pathfm.data.datasets import open_dataset
from pathfm.dist.env import ALONE, Ranks
from pathfm.dist.groups import joined
from pathfm.errors import UserError
from pathfm.jobs import training_data as training_data_module
from pathfm.jobs.pretrain import pretrain
from pathfm.jobs.run_start import claim_run
from pathfm.jobs.training_data import TrainingData, augments_on_device
from pathfm.recipe import Recipe
from pathfm.training.plan import plan_training
from tests.jobs.journeys import TINY, make_tiles, metrics

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("cpu", CPU, False), ("cpu", GPU, False), ("auto", CPU, False), ("auto", GPU, True), ("cuda", GPU, True)],
)
def test_crops_are_made_where_the_recipe_says(setting, device, expected):
    assert augments_on_device(setting, device) == expected


def test_a_gpu_that_is_not_trained_on_makes_no_crops():
    with pytest.raises(UserError, match=r"^augment.device=cuda needs training on a GPU, but it runs on cpu; .*auto$"):
        augments_on_device("cuda", CPU)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return make_tiles(tmp_path_factory.mktemp("tiles"))


def training_data(tiles, num_workers=0):
    """Batches of 12 samples, which 2, 3 and 4 ranks can share; 40 tiles, so that an epoch ends within a batch."""
    settings = {"train": {"num_workers": num_workers, "batch_size_per_gpu": 12}, "optim": {"total_steps": 5}}
    recipe = build(Recipe, [Layer("tiny", yaml.safe_load(TINY)), Layer("the test", settings)])
    dataset = open_dataset(f"Pathology:root={tiles}")
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, 1, len(dataset))
    return TrainingData(recipe, plan, dataset, CPU)


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("num_workers", [1, 4])
def test_crops_and_masks_are_the_same_with_any_number_of_workers(tiles, num_workers):
    alone = training_data(tiles).batches(Ranks(), from_step=0)
    helped = training_data(tiles, num_workers).batches(Ranks(), from_step=0)
    for ours, oracle in zip(helped, alone, strict=True):
        for name, tensor in tensors(ours).items():
            assert torch.equal(tensor, tensors(oracle)[name]), name


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_ranks_crops_and_masks_together_are_those_of_one_rank(tiles, world_size):
    data = training_data(tiles)
    shares = [data.batches(Ranks(rank, world_size), from_step=0) for rank in range(world_size)]
    num_steps = 0
    for whole, *parts in zip(data.batches(Ranks(), from_step=0), *shares, strict=True):
        for name in ("global_crops", "local_crops", "masks"):
            by_view = [getattr(part, name).unflatten(0, (-1, part.num_samples)) for part in parts]
            assert torch.equal(torch.cat(by_view, dim=1).flatten(0, 1), getattr(whole, name)), name
        for name in ("positions", "samples"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        num_steps += 1
    assert num_steps == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_device_makes_a_runs_batches_as_the_workers_do(tiles, monkeypatch, num_workers):
    by_workers = training_data(tiles)
    monkeypatch.setattr(training_data_module, "augments_on_device", lambda setting, device: True)
    by_device = training_data(tiles, num_workers)

    on_device = map(by_device.cropped, by_device.batches(Ranks(), from_step=3))
    pairs = zip(on_device, by_workers.batches(Ranks(), from_step=3), strict=True)
    for ours, oracle in [*pairs, (by_device.first_samples(4), by_workers.first_samples(4))]:
        assert torch.equal(ours.positions, oracle.positions)
        assert torch.equal(ours.masks, oracle.masks)
        for crops, expected in ((ours.global_crops, oracle.global_crops), (ours.local_crops, oracle.local_crops)):
            assert crops.dtype == torch.uint8
            assert (crops.float() - expected.float()).abs().mean() < 0.1


def test_a_run_trains_on_crops_that_its_device_makes(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data_module, "augments_on_device", lambda setting, device: True)
    settings = {"train": {"dataset_path": f"Pathology:root={tiles}"}, "optim": {"total_steps": 3}}
    recipe = build(Recipe, [Layer("tiny", yaml.safe_load(TINY)), Layer("the test", settings)])
    with ExitStack() as stack:
        team = stack.enter_context(joined(ALONE, CPU, stall_after_s=300, lost_after_s=60))
        assert pretrain(recipe, claim_run(stack, tmp_path / "run", begin_anew=False), team) == 0
    (line,) = metrics(tmp_path / "run")
    assert (line["step"], line["steps_skipped"]) == (3, 0)
    assert math.isfinite(line["total_loss"])
