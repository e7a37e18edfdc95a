"""Forecasts against what torch's allocators counted while the real step ran."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.assemble import mask_weights
from pathfm.augment.config import AugmentConfig, CropsConfig, resolve
from pathfm.augment.draw import draw_crops
from pathfm.batch import Batch, Uncropped
from pathfm.dist.env import ALONE
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.memory_forecast import GIB, Forecast, Setting, usable_bytes
from pathfm.jobs.networks import method_of, spread
from pathfm.jobs.warm_start import freeze_blocks
from pathfm.recipe import Recipe, changes_of_identity, read_recipe
from pathfm.training.memory import BACKBONE, MOMENTS, STUDENT, TEACHER, cropping_bytes
from pathfm.training.plan import TrainingPlan
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, train_step

CPU = torch.device("cpu")
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


def forecast_bytes(recipe: Recipe, device_type: str = "cpu") -> tuple[int, list[Batch], TrainingPlan]:
    with Forecast(recipe, device_type=device_type) as forecast:
        parts = forecast.parts(forecast.setting)
        return forecast.found(forecast.setting).peak.total_bytes, parts, forecast.plan


def with_contents(part: Batch) -> Batch:
    """As many masked patches as the shapes say."""
    masks = torch.zeros(part.masks.shape, dtype=torch.bool)
    masks.view(-1)[torch.randperm(masks.numel())[: len(part.mask_indices)]] = True
    return replace(
        part,
        global_crops=contents_of(part.global_crops),
        local_crops=contents_of(part.local_crops),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=mask_weights(masks),
        positions=torch.arange(part.num_samples),
        samples=torch.arange(part.num_samples),
    )


def contents_of(crops: torch.Tensor) -> torch.Tensor:
    return torch.randn(crops.shape) if crops.is_floating_point() else torch.randint(255, crops.shape, dtype=crops.dtype)


def fresh_state(recipe: Recipe, plan: TrainingPlan, device: torch.device) -> TrainingState:
    method = method_of(recipe, plan.koleo_group_size)
    freeze_blocks(method.student.backbone, recipe.student.freeze_blocks)
    spread(method, recipe, ALONE, device)
    return TrainingState(method, build_optimizer(method, recipe.optim), build_loss_scale(recipe.train, device))


def bytes_on_the_cpu(recipe: Recipe, parts: list[Batch], plan: TrainingPlan) -> int:
    """The most that was allocated at once in the step; the profiler is on before the first weight is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        state = fresh_state(recipe, plan, CPU)
        of_this_step, _next = [[with_contents(part) for part in parts] for _ in range(2)]
        with record_function("the step"):
            train_step(state, of_this_step, plan.schedules.at(0), recipe.train, recipe.optim, ALONE)
    return most_alive(profiled, since="the step")


def most_alive(profiled: profile, since: str | None = None) -> int:
    """The most bytes that were allocated at once (from a record of this name on)."""
    events = profiled.profiler.kineto_results.events()
    began = next((event.start_ns() for event in events if event.name() == since), 0)
    alive = most = 0
    for moment, num_bytes in sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    ):
        alive += num_bytes
        most = max(most, alive) if moment >= began else most
    return most


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
    recipe = recipe_of(*words)
    forecast, parts, plan = forecast_bytes(recipe)
    assert forecast == pytest.approx(bytes_on_the_cpu(recipe, parts, plan), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("words", [(), ("train.micro_batch_size=8",), ("parallel.recompute=selective",)], ids=str)
def test_a_forecast_is_within_a_tenth_of_what_a_gpu_allocates(words: tuple[str, ...]):
    recipe = read_recipe(
        CONFIGS / "vits14.yaml", ["train.batch_size_per_gpu=16", "student.attention=sdpa", *words]
    ).recipe
    forecast, parts, plan = forecast_bytes(recipe, "cuda")
    device = torch.device("cuda", 0)
    state = fresh_state(recipe, plan, device)
    of_this_step, _next = [[with_contents(part).to(device) for part in parts] for _ in range(2)]
    torch.cuda.reset_peak_memory_stats(device)
    train_step(state, of_this_step, plan.schedules.at(0), recipe.train, recipe.optim, ALONE)
    assert forecast == pytest.approx(torch.cuda.max_memory_allocated(device), rel=0.1)


def test_what_ranks_share_is_divided_among_them():
    recipe = recipe_of("dino.head_n_prototypes=4096")
    of_all = {}
    for strategy in ("ddp", "fsdp", "hybrid"):
        with Forecast(recipe, gpus=8, gpus_per_node=4) as forecast:
            of_all[strategy] = forecast.found(Setting(strategy, "none", 4)).peak.bytes_of
    for kind in (STUDENT, TEACHER, MOMENTS):
        assert of_all["fsdp"][kind] == pytest.approx(of_all["ddp"][kind] / 8, rel=0.1)
        assert of_all["hybrid"][kind] == pytest.approx(of_all["ddp"][kind] / 4, rel=0.1)
    assert of_all["fsdp"][BACKBONE] == pytest.approx(of_all["ddp"][BACKBONE], rel=0.1)


def test_a_real_step_goes_as_before_behind_a_rehearsal():
    recipe = recipe_of("train.precision=fp32")
    _, parts, plan = forecast_bytes(recipe)
    state = fresh_state(recipe, plan, CPU)
    train_step(state, [with_contents(part) for part in parts], plan.schedules.at(0), recipe.train, recipe.optim, ALONE)
    assert not dist.is_initialized()
    assert all(torch.isfinite(weight).all() for weight in state.method.student.parameters())


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


def test_makers_gigabytes_are_not_all_usable():
    assert 78.5 < usable_bytes(80) / GIB < 79.1  # of an H100, torch finds 79.1
    assert usable_bytes(8) / GIB == 7.5


def test_the_making_of_crops_is_counted_as_the_code_that_makes_them_allocates():
    crops, augmentation = CropsConfig(), resolve(AugmentConfig(preset="pathology"))
    plans = draw_crops(augmentation, crops, [(256, 256)] * 4, 0, range(4))
    numbers = {name: torch.from_numpy(values) for name, values in vars(plans).items()}
    tiles = Uncropped(torch.zeros(4, 256, 256, 3, dtype=torch.uint8), numbers)
    batch = replace(with_contents(forecast_bytes(recipe_of())[1][0]), uncropped=tiles)
    crop_on_device(batch, crops)  # makes what is kept for the next
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        crop_on_device(batch, crops)
    assert cropping_bytes(crops, augmentation, 4) == pytest.approx(most_alive(profiled), rel=0.1)


def test_the_small_recipe_fits_a_gpu_of_8_gb_and_is_vits14():
    small, usual = (read_recipe(CONFIGS / f"{name}.yaml").recipe for name in ("small_gpu", "vits14"))
    assert changes_of_identity(small, usual) == []
    with Forecast(small) as forecast:
        assert forecast.found(forecast.setting).fits(8)
