"""Forecasts against what torch's allocators counted while the real step ran."""

import pytest
import torch
import torch.distributed as dist
from memory import measured_bytes, most_alive
from torch.profiler import ProfilerActivity, profile

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.config import AugmentConfig, CropsConfig, resolve
from pathfm.augment.draw import draw_crops
from pathfm.batch import Batch, Uncropped
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.memory_forecast import GIB, Forecast, Setting, usable_bytes
from pathfm.recipe import Recipe, changes_of_identity, read_recipe
from pathfm.training.memory import BACKBONE, MOMENTS, STUDENT, TEACHER, cropping_bytes

# So small that a step takes a second, and yet most of its memory is what networks keep.
SMALL = (
    "student.arch=vit4k_xs",
    "student.patch_size=14",
    "student.drop_path_rate=0.1",
    "student.attention=sdpa",
    "dino.head_n_prototypes=512",
    "dino.head_hidden_dim=256",
    "ibot.head_hidden_dim=256",
    "crops.global_crops_size=84",
    "crops.local_crops_size=42",
    "crops.local_crops_number=2",
    "train.batch_size_per_gpu=8",
    "train.precision=fp32",
)


def recipe_of(*words: str) -> Recipe:
    return read_recipe(None, [*SMALL, *words]).recipe


def forecast_and_measured_bytes(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    with Forecast(recipe, device_type=device.type) as forecast:
        parts, peak = forecast.parts(forecast.setting), forecast.found(forecast.setting).peak
    return peak.total_bytes, measured_bytes(recipe, parts, forecast.plan, device)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("train.micro_batch_size=4",),
        ("train.centering=sinkhorn_knopp", "train.micro_batch_size=4", "ibot.separate_head=true"),
        ("parallel.recompute=blocks", "student.num_register_tokens=4"),
        ("parallel.recompute=selective", "student.drop_path_rate=0.4", "student.ffn_layer=swiglu"),
        # In parts, KoLeo's groups are seen twice: the blocks are cast and recomputed all the same.
        (
            "parallel.recompute=selective",
            "train.precision=bf16",
            "train.micro_batch_size=4",
            "train.batch_size_per_gpu=8",
        ),
        ("method=dino", "dino.use_bn_in_head=true"),
        ("student.feature_width=96", "student.patch_size=1", "crops.global_crops_size=6", "crops.local_crops_size=3"),
        ("student.freeze_blocks=3",),
    ],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_a_forecast_is_what_the_real_step_allocates_on_a_cpu(words: tuple[str, ...]):
    forecast, measured = forecast_and_measured_bytes(recipe_of(*words), torch.device("cpu"))
    assert forecast == pytest.approx(measured, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("words", [(), ("train.micro_batch_size=8",), ("parallel.recompute=selective",)], ids=str)
def test_a_forecast_is_within_a_tenth_of_what_a_gpu_allocates(words: tuple[str, ...]):
    overrides = ["train.batch_size_per_gpu=16", "student.attention=sdpa", *words]
    recipe = read_recipe(CONFIGS / "vits14.yaml", overrides).recipe
    forecast, measured = forecast_and_measured_bytes(recipe, torch.device("cuda", 0))
    assert forecast == pytest.approx(measured, rel=0.1)


def test_what_ranks_share_is_divided_among_them():
    recipe = recipe_of("dino.head_n_prototypes=4096")
    of_all = {}
    for strategy in ("ddp", "fsdp", "hybrid"):
        with Forecast(recipe, gpus=8, gpus_per_node=4) as forecast:
            of_all[strategy] = forecast.found(Setting(strategy, "none", 4)).peak.bytes_of
    assert not dist.is_initialized(), "the ranks were pretended"
    for kind in (STUDENT, TEACHER, MOMENTS):
        assert of_all["fsdp"][kind] == pytest.approx(of_all["ddp"][kind] / 8, rel=0.1)
        assert of_all["hybrid"][kind] == pytest.approx(of_all["ddp"][kind] / 4, rel=0.1)
    assert of_all["fsdp"][BACKBONE] == pytest.approx(of_all["ddp"][BACKBONE], rel=0.1)


def test_what_is_proposed_fits_and_what_is_slower_takes_more_at_once():
    with Forecast(recipe_of("train.precision=bf16")) as forecast:
        alone = forecast.found(forecast.setting)
        gigabytes = 0.5 + (alone.needed_bytes - 1) / GIB  # by a byte too small for what the recipe says
        proposals = forecast.proposals(gigabytes)
        assert not alone.fits(gigabytes)
        assert proposals
        assert all(found.fits(gigabytes) for found in proposals)
        assert [found.setting.slowness for found in proposals] == sorted(found.setting.slowness for found in proposals)
        sizes = [found.setting.micro_batch for found in proposals]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == 8
        assert Forecast(recipe_of(*proposals[0].setting.words().split())).setting == proposals[0].setting


def test_recomputing_comes_before_parts_that_are_smaller_than_koleos_groups():
    with Forecast(recipe_of("dino.koleo_group_size=8")) as forecast:
        gigabytes = 0.5 + (forecast.found(forecast.setting).needed_bytes - 1) / GIB
        in_parts = forecast.found(Setting("ddp", "none", 4))
        assert in_parts.fits(gigabytes)
        assert forecast.sees_twice(in_parts.setting)
        (first,) = forecast.proposals(gigabytes)
        assert first.setting.micro_batch == 8
        assert first.setting.recompute != "none"


def test_makers_gigabytes_are_not_all_usable():
    assert 78.5 < usable_bytes(80) / GIB < 79.1  # of an H100, torch finds 79.1
    assert usable_bytes(8) / GIB == 7.5


def test_the_making_of_crops_is_counted_as_the_code_that_makes_them_allocates():
    crops, augmentation = CropsConfig(), resolve(AugmentConfig(preset="pathology"))
    plans = draw_crops(augmentation, crops, [(256, 256)] * 4, 0, range(4))
    numbers = {name: torch.from_numpy(values) for name, values in vars(plans).items()}
    tiles = Uncropped(torch.zeros(4, 256, 256, 3, dtype=torch.uint8), numbers)
    nothing = torch.empty(0)
    batch = Batch(nothing, nothing, nothing, nothing, nothing, nothing, nothing, uncropped=tiles)
    crop_on_device(batch, crops)  # makes what is kept for the next
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        crop_on_device(batch, crops)
    assert cropping_bytes(crops, augmentation, 4) == pytest.approx(most_alive(profiled), rel=0.1)


def test_the_small_recipe_fits_a_gpu_of_8_gb_and_is_vits14():
    small, usual = (read_recipe(CONFIGS / f"{name}.yaml").recipe for name in ("small_gpu", "vits14"))
    assert changes_of_identity(small, usual) == []
    with Forecast(small) as forecast:
        assert forecast.found(forecast.setting).fits(8)
