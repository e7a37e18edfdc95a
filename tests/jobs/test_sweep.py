"""Every combination of a sweep's values is one run with a name of its own."""

import pytest

from pathfm.errors import UserError
from pathfm.jobs.sweep import points


def test_the_last_setting_varies_fastest() -> None:
    found = points(["optim.base_lr=1e-3,2e-3", "train.seed=0,1"])
    assert [point.suffix for point in found] == [
        "base_lr_1e-3-seed_0",
        "base_lr_1e-3-seed_1",
        "base_lr_2e-3-seed_0",
        "base_lr_2e-3-seed_1",
    ]
    assert found[2].overrides == ("optim.base_lr=2e-3", "train.seed=0")


def test_a_comma_in_brackets_belongs_to_the_value() -> None:
    found = points(["crops.global_crops_scale=[0.32,1.0],[0.5,1.0]"])
    assert [point.overrides for point in found] == [
        ("crops.global_crops_scale=[0.32,1.0]",),
        ("crops.global_crops_scale=[0.5,1.0]",),
    ]
    assert found[0].suffix == "global_crops_scale_0.32_1.0"


@pytest.mark.parametrize("sweep", ["optim.base_lr", "optim.base_lr=", "=1", "train.seed=1,,2"])
def test_a_mistake_is_one_line_with_an_example(sweep: str) -> None:
    with pytest.raises(UserError, match=r"as in --sweep optim.base_lr=1e-3,2e-3"):
        points([sweep])


def test_two_runs_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"-dataset_path_a_b: train.dataset_path=a/b and train.dataset_path=a:b"):
        points(["train.dataset_path=a/b,a:b"])
